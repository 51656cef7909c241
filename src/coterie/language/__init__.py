"""Language-model systems: what is each one's own; their routers, banks and losses are in `coterie.nn`."""
