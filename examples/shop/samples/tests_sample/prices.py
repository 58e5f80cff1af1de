"Prices in cents."

def with_vat(cents:int, percent:int=19) -> int:
    "The price with value added tax, rounded half up"
    return (cents*(100+percent) + 50)//100

def shown(cents:int) -> str: return f'{cents//100}.{cents%100:02}'
