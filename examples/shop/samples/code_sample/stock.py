"A sample for the scan: what pyflakes finds here is there on purpose."
def in_stock(product): return product['quantity'] > 0

def reorder(products, level=5):
    low = [p for p in products if p['quantity'] < level]
    if not low: return None
    return order_from_supplier(low)

def in_stock(product): return product['quantity'] > product.get('reserved', 0)
