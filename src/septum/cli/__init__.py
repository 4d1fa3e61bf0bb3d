"""The ``septum`` command: one thin module per subcommand, which asks the library and prints its answer."""
