"""``report.html``: what ``attngen optimize`` found and decided, as one page that needs nothing beside it.

In order: ``svg`` (shapes), ``masks`` (which blocks of pairs count), ``roofline`` (work and traffic under the device's
ceilings), ``spent`` (parts of the predicted time), ``document`` (the page itself, from ``page.html.jinja``).
"""
