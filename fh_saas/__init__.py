"""Background jobs for FastHTML apps in which every customer has a database of their own

A route answers at once and the slow work goes on behind it: an import, an export, a sync, a scan, a report. The job is a row in the customer's own database. It runs after the response, is repeated when it fails, reports its progress, survives a killed process, and needs no broker."""

__version__ = "0.10.0"
