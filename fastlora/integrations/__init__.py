"""Bridges to other libraries; each is imported only where that library is."""
