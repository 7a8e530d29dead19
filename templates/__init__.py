"""Kernel templates, rendered by ``attngen.emit``; read through this package so that wheels and checkouts agree."""
