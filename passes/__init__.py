"""Everything that walks an fx graph, in the order it runs."""
