"""The demo: a fleet of eight workers on the whole suite, with real pages behind real proxies.

The surroundings (`site`, `proxies`, `crawl`) stand alone and know nothing of Muster, as a site on the internet knows
nothing of who plans its visitors' work.
"""
