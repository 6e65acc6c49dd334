"""The demo that needs no network: a tiny English base, short stories in three languages, and the driver that trains."""
