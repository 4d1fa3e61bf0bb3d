"""Facts of the TDX architecture, without behaviour: numbers, layouts, tables and the shapes of machines."""
