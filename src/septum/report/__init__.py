"""What people see: tables and diagrams that read the same in a terminal, in a file and in a mail."""
