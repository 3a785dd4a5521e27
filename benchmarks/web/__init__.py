"""Crawls of loopback servers, beside what httpx and lxml alone would take."""
