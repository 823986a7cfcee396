"""Transport: process groups, exchanges between ranks, the format of rows on the wire, and the ledger of what travelled."""
