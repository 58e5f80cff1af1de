"A sample for the scan: what pyflakes finds here is there on purpose."
import os
import json, math

def discount(price, percent):
    reduced = price*(100-percent)/100
    before = price
    return math.floor(reduced)

def label(product):
    return f"only today!" + product['name']
