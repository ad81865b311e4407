"""One crawl of the demo's site: search for a keyword, follow the results, read a title and a summary from each.

It is what a worker's own code would be, and knows nothing of leases. It says who it is, keeps to robots.txt, pauses
between pages, and does what a 429 asks for; when the site still refuses, it reports that it was blocked and stops.
"""

import asyncio
import json
import logging
import os
import urllib.robotparser
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import aiohttp
from bs4 import BeautifulSoup, Tag

USER_AGENT = "muster-demo/1.0"
JAR_NAME = "Cookies"
STATE_NAME = "Local State"

# A result's title and summary are shown in a listing; the allocator takes titles of up to 1024 characters.
_MAX_TITLE_CHARS = 200
_MAX_SUMMARY_CHARS = 500

OnPage = Callable[[int, int, int, int], Awaitable[None]]
"""Told after every result page: the page's number from 1, how many there are, products found, errors so far."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Product:
    """One thing found.

    Attributes:
        product_id: Its id at the site: the module's dotted name.
        title: The module's name as its page gives it.
        summary: The first paragraph of its documentation, at most 500 characters; empty if it has none.
        url: Where it was found.
        rank: Its place in the search's listing, from 1.
    """

    product_id: str
    title: str
    summary: str
    url: str
    rank: int


@dataclass(frozen=True, slots=True)
class CrawlOutcome:
    """How a crawl ended.

    Attributes:
        pages: Result pages read.
        products: What they hold, in the order of the listing.
        errors: What went wrong, a line each; pages that failed are passed over.
        blocked: The site refused twice in a row; the pages after that were left alone.
        retry_after_seconds: How long the site asked to be left alone when it last refused, whether or not the retry
            then went through; None if it never refused.
        requests: Requests sent through the proxy, robots.txt and retries included, whether answered or not.
        visits: How many searches the site has seen from this cookie jar, this one included; 0 if the search failed.
    """

    pages: int
    products: tuple[Product, ...]
    errors: tuple[str, ...]
    blocked: bool
    retry_after_seconds: float | None
    requests: int
    visits: int

    @property
    def failed(self) -> bool:
        """Whether it ended, unblocked, with nothing but errors."""
        return not self.blocked and not self.products and bool(self.errors)


@dataclass(frozen=True, slots=True)
class Manners:
    """How a crawl behaves towards the site.

    Attributes:
        delay_seconds: The pause before each result page.
        timeout_seconds: The longest a request may take.
        max_wait_seconds: The longest it waits for a Retry-After; a site that asks for more has blocked it.
        sleep: Waits; tests put a recorder here.
    """

    delay_seconds: float = 0.05
    timeout_seconds: float = 30.0
    max_wait_seconds: float = 10.0
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class _Blocked(Exception):
    """The site refused twice in a row, or for longer than the crawl would wait."""


class _PageFailed(Exception):
    """A page could not be had; the text is one line for the crawl's errors."""


async def crawl(
    site_url: str,
    proxy_url: str,
    keyword: str,
    max_pages: int,
    profile: Path,
    on_page: OnPage,
    *,
    manners: Manners | None = None,
) -> CrawlOutcome:
    """Search the site for a keyword and read the first result pages, all through a forward proxy.

    Failures of the site, the proxy and the network are part of the outcome. The cookie jar is saved however it ends,
    unless the process is killed.

    Args:
        site_url: The site's base URL.
        proxy_url: The forward proxy's URL.
        keyword: One word.
        max_pages: The most result pages to read, from 1.
        profile: The profile folder, which holds the cookie jar; made if absent. It belongs to the crawl until it ends.
        on_page: Awaited after every result page; what it raises ends the crawl and goes to the caller.
        manners: Pauses and limits.

    Returns:
        What was found and what went wrong.

    Raises:
        OSError: The profile folder cannot be read or written.
        ValueError: `max_pages` is below 1.
    """
    if max_pages < 1:
        raise ValueError(f"max_pages is {max_pages}, and must be at least 1")
    jar = load_jar(profile)
    manners = manners or Manners()
    # proxy.py logs connections, not requests: one of each makes its log comparable with `CrawlOutcome.requests`.
    connector = aiohttp.TCPConnector(force_close=True)
    timeout = aiohttp.ClientTimeout(total=manners.timeout_seconds)
    headers = {"User-Agent": USER_AGENT}
    async with aiohttp.ClientSession(
        connector=connector, cookie_jar=jar, timeout=timeout, headers=headers, proxy=proxy_url
    ) as client:
        run = _Run(client, site_url.rstrip("/"), manners)
        try:
            await run.crawl(keyword, max_pages, on_page)
        except _Blocked:
            run.blocked = True
        except _PageFailed as failed:
            run.errors.append(str(failed))
        finally:
            save_jar(jar, profile, last_keyword=keyword)
    return run.outcome()


@dataclass(slots=True)
class _Run:
    client: aiohttp.ClientSession
    site_url: str
    manners: Manners
    pages: int = 0
    products: list[Product] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    blocked: bool = False
    retry_after_seconds: float | None = None
    requests: int = 0
    visits: int = 0

    def outcome(self) -> CrawlOutcome:
        found, wrong = tuple(self.products), tuple(self.errors)
        wait, sent = self.retry_after_seconds, self.requests
        return CrawlOutcome(self.pages, found, wrong, self.blocked, wait, sent, self.visits)

    async def crawl(self, keyword: str, max_pages: int, on_page: OnPage) -> None:
        robots = urllib.robotparser.RobotFileParser()
        robots.parse((await self._get(f"{self.site_url}/robots.txt")).splitlines())
        search_url = f"{self.site_url}/search?key={keyword}"
        links = result_links(await self._get(search_url), search_url)
        self.visits = self._seen_visits()
        urls = [url for url in links if robots.can_fetch(USER_AGENT, url)][:max_pages]
        for rank, url in enumerate(urls, start=1):
            await self.manners.sleep(self.manners.delay_seconds)
            try:
                self.products.append(read_product(await self._get(url), url, rank))
                self.pages += 1
            except _PageFailed as failed:
                self.errors.append(str(failed))
            await on_page(rank, len(urls), len(self.products), len(self.errors))

    async def _get(self, url: str) -> str:
        wait_seconds = 0.0
        for attempt in (1, 2):
            self.requests += 1
            try:
                async with self.client.get(url) as answer:
                    if answer.status == 200:
                        return await answer.text()
                    if answer.status != 429:
                        raise _PageFailed(f"{url}: status {answer.status}")
                    wait_seconds = retry_after(answer.headers.get("Retry-After", ""), datetime.now(UTC))
            except (aiohttp.ClientError, TimeoutError) as cause:
                raise _PageFailed(f"{url}: {type(cause).__name__}: {cause}") from cause
            self.retry_after_seconds = wait_seconds
            if attempt == 2 or wait_seconds > self.manners.max_wait_seconds:
                break
            await self.manners.sleep(wait_seconds)
        raise _Blocked(url)

    def _seen_visits(self) -> int:
        for cookie in self.client.cookie_jar:
            if cookie.key == "visits" and cookie.value.isdecimal():
                return int(cookie.value)
        return 0


def retry_after(header: str, now: datetime) -> float:
    """Read a Retry-After header, which holds seconds or a date.

    Args:
        header: Its value; empty if the answer had none.
        now: The time a date is held against, with a time zone.

    Returns:
        Seconds from now, at least 0; 1 if the header is missing or cannot be read.
    """
    text = header.strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - now).total_seconds())
    except (TypeError, ValueError):
        # A date without a zone is as unreadable as no date at all.
        return 1.0


def result_links(html: str, search_url: str) -> list[str]:
    """Find the pages which a search lists.

    Args:
        html: The search's page.
        search_url: Its URL, against which links are resolved.

    Returns:
        URLs of module pages on the same site, each once, in the order of the listing.
    """
    listing = BeautifulSoup(html, "html.parser").select_one("table.section")
    if listing is None:
        return []
    urls = (urljoin(search_url, str(link["href"])) for link in listing.select("a[href$='.html']"))
    own = (url for url in urls if urlsplit(url).netloc == urlsplit(search_url).netloc)
    return list(dict.fromkeys(own))


def read_product(html: str, url: str, rank: int) -> Product:
    """Read what a module's page says about it.

    Args:
        html: The page.
        url: Its URL, whose last part is the module's name.
        rank: Its place in the listing, from 1.

    Returns:
        The product. A page without documentation has an empty summary.
    """
    # The module's own documentation stands before the first section; what follows documents its members, and is most of
    # a page of up to 200 kB, which takes 50 times as long to parse.
    head = BeautifulSoup(html.partition('<table class="section">')[0], "html.parser")
    name = urlsplit(url).path.rsplit("/", 1)[-1].removesuffix(".html")
    heading = head.select_one("table.heading strong.title")
    title = _text(heading) if heading else name
    documentation = head.select_one("p > span.code")
    summary = _text(documentation).split("\n\n")[0] if documentation else ""
    return Product(name, title[:_MAX_TITLE_CHARS], " ".join(summary.split())[:_MAX_SUMMARY_CHARS], url, rank)


def _text(element: Tag) -> str:
    lines = element.get_text().replace("\xa0", " ").strip().splitlines()
    return "\n".join(line.strip() for line in lines)


def load_jar(profile: Path) -> aiohttp.CookieJar:
    """Restore the cookie jar from a profile folder.

    A jar that cannot be read is left out with a warning: the crawl then comes as a new visitor.

    Args:
        profile: The folder.

    Returns:
        The jar, empty if the folder has none. Must be called within a running event loop.

    Raises:
        OSError: The file is there and cannot be read.
    """
    # Cookies of a site named by its address are kept only by a jar that is told to.
    jar = aiohttp.CookieJar(unsafe=True)
    path = profile / JAR_NAME
    try:
        # aiohttp takes whatever is not JSON for a pickle of its earlier versions; nothing but JSON may get that far.
        json.loads(path.read_text(encoding="utf-8"))
        jar.load(path)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        _log.warning("the cookie jar %s cannot be read and is left out: %s", path, cause)
    return jar


def save_jar(jar: aiohttp.CookieJar, profile: Path, *, last_keyword: str) -> None:
    """Save the cookie jar and a note about its last use into a profile folder.

    Each file is replaced as a whole, so that a crawl killed meanwhile leaves the one or the other, and never half.
    The folder is made if absent.

    Args:
        jar: The jar.
        profile: The folder.
        last_keyword: What was searched for.

    Raises:
        OSError: The folder cannot be written.
    """
    profile.mkdir(parents=True, exist_ok=True)
    draft = profile / f"{JAR_NAME}.draft"
    jar.save(draft)
    draft.replace(profile / JAR_NAME)
    state = {"last_keyword": last_keyword, "saved_at": datetime.now(UTC).isoformat(), "process_id": os.getpid()}
    draft = profile / f"{STATE_NAME}.draft"
    draft.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    draft.replace(profile / STATE_NAME)
