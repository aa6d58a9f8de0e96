"""What a round computes: symmetries, alignment, fusion, diagnostics. No socket, no file, no clock."""
