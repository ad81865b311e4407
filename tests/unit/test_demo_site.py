"""The demo's surroundings: the site, the proxies and the crawl, as real processes on loopback."""

import asyncio
import csv
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
import pytest_asyncio

from demo.children import ChildFailed, child_command
from demo.crawl import (
    CrawlOutcome,
    Manners,
    Product,
    crawl,
    load_jar,
    read_product,
    result_links,
    retry_after,
    save_jar,
)
from demo.proxies import RunningProxy, running_proxies
from demo.site import RunningSite, closed_prefixes, running_site

ROOT = Path(__file__).parents[2]


class Pauses:
    """Records the pauses a crawl asks for, and lets it go on at once."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


class Progress:
    """Records what a crawl says after each page."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, int, int]] = []

    async def __call__(self, page: int, pages: int, products: int, errors: int) -> None:
        self.steps.append((page, pages, products, errors))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningSite]:
    """A site that refuses nothing."""
    async with running_site(tmp_path_factory.mktemp("site"), busy_rate=0.0) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningProxy]:
    """A forward proxy."""
    async with running_proxies(1, tmp_path_factory.mktemp("proxies")) as (running,):
        yield running


@pytest_asyncio.fixture
async def busy_site(tmp_path: Path) -> AsyncIterator[RunningSite]:
    """A site that refuses every page."""
    async with running_site(tmp_path / "busy", busy_rate=1.0) as running:
        yield running


@pytest_asyncio.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """A client without a proxy, which keeps cookies."""
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        yield session


async def fetch(client: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with client.get(url) as answer:
        return answer.status, await answer.text()


async def visits(site: RunningSite, client: aiohttp.ClientSession) -> dict[str, int]:
    counted: dict[str, int] = json.loads((await fetch(client, f"{site.url}/__visits"))[1])
    return counted


def cookies(client: aiohttp.ClientSession) -> dict[str, str]:
    return {cookie.key: cookie.value for cookie in client.cookie_jar}


class TestSite:
    async def test_search_links_to_pages_and_counts_the_visit(
        self, site: RunningSite, client: aiohttp.ClientSession
    ) -> None:
        status, listing = await fetch(client, f"{site.url}/search?key=json")
        assert status == 200
        links = result_links(listing, f"{site.url}/search?key=json")
        assert f"{site.url}/json.decoder.html" in links
        status, page = await fetch(client, links[0])
        assert status == 200
        assert "JavaScript" in page.replace("&nbsp;", " ")

        before = await visits(site, client)
        session = cookies(client)["sid"]
        assert before[session] == 1
        await fetch(client, f"{site.url}/search?key=socket")
        async with aiohttp.ClientSession() as stranger:
            await fetch(stranger, f"{site.url}/search?key=json")
        after = await visits(site, client)
        assert after[session] == 2
        assert cookies(client)["visits"] == "2"
        assert [after[sid] for sid in after if sid not in before] == [1]

    @pytest.mark.parametrize(
        ("path", "status"),
        [
            ("/", 200),
            ("/topics.html", 200),
            ("/topic?key=LOOPING", 200),
            ("/json.JSONEncoder.html", 200),
            ("/pydoc_data/_pydoc.css", 200),
            ("/no_such_module.html", 404),
            ("/topic?key=../x.css", 404),
            ("/search?key=two%20words", 400),
            ("/search", 400),
            ("/antigravity.html", 403),
            ("/topic?key=this", 403),
            ("/test.support.html", 403),
        ],
    )
    async def test_status(self, site: RunningSite, client: aiohttp.ClientSession, path: str, status: int) -> None:
        assert (await fetch(client, site.url + path))[0] == status

    async def test_a_share_of_pages_is_refused_the_same_way_every_time(
        self, tmp_path: Path, client: aiohttp.ClientSession
    ) -> None:
        refused: list[list[int]] = []
        for folder in ("first", "second"):
            async with running_site(tmp_path / folder, busy_rate=0.25, retry_after_seconds=7, seed=3) as site:
                statuses = []
                for _ in range(200):
                    async with client.get(f"{site.url}/abc.html") as answer:
                        statuses.append(answer.status)
                        assert answer.headers.get("Retry-After") == ("7" if answer.status == 429 else None)
                refused.append([n for n, status in enumerate(statuses) if status == 429])
        assert refused[0] == refused[1]
        assert 30 <= len(refused[0]) <= 70

    def test_robots_names_what_is_closed(self, tmp_path: Path) -> None:
        for path in ("site-packages/pip/__main__.py", "json/test/x.py", "email/__main__.py"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
        prefixes = closed_prefixes(tmp_path)
        assert {"/json.test", "/email.__main__", "/antigravity."} <= set(prefixes)
        assert not [prefix for prefix in prefixes if "pip" in prefix]

    async def test_sigterm_stops_it_with_its_child(self, tmp_path: Path) -> None:
        async with running_site(tmp_path) as site:
            front = psutil.Process(site.pid)
            (pydoc,) = front.children()
            front.terminate()
            gone, alive = await asyncio.to_thread(psutil.wait_procs, [front, pydoc], 10)
            assert (len(gone), alive) == (2, [])
        assert (tmp_path / "stderr.log").read_text() == ""

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
    async def test_its_child_does_not_outlive_a_kill(self, tmp_path: Path) -> None:
        async with running_site(tmp_path) as site:
            front = psutil.Process(site.pid)
            (pydoc,) = front.children()
            front.kill()
            _, alive = await asyncio.to_thread(psutil.wait_procs, [front, pydoc], 10)
            assert alive == []

    async def test_it_ends_when_pydoc_does(self, tmp_path: Path) -> None:
        async with running_site(tmp_path) as site:
            front = psutil.Process(site.pid)
            front.children()[0].kill()
            _, alive = await asyncio.to_thread(psutil.wait_procs, [front], 10)
            assert alive == []
        assert (tmp_path / "stderr.log").read_text() == "pydoc ended with code -9\n"

    async def test_a_port_in_use_is_one_line_and_exit_code_2(self, site: RunningSite) -> None:
        command = [sys.executable, "-m", "demo.site", "--port", site.url.rpartition(":")[2]]
        done = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert done.returncode == 2
        assert done.stderr.startswith("the site cannot start: ")
        assert done.stderr.count("\n") == 1


class TestProxies:
    async def test_each_forwards_and_counts(self, tmp_path: Path, site: RunningSite) -> None:
        async with running_proxies(2, tmp_path / "proxies") as (first, second):
            assert (first.requests(), second.requests()) == (0, 0)
            async with aiohttp.ClientSession(
                proxy=first.endpoint, connector=aiohttp.TCPConnector(force_close=True)
            ) as c:
                assert (await fetch(c, f"{site.url}/json.html"))[0] == 200
                assert (await fetch(c, f"{site.url}/no_such_module.html"))[0] == 404
                assert await settled(first, c, f"{site.url}/__visits", 2) >= 2
            assert second.requests() == 0
            main = psutil.Process(first.pid)
            processes = [main, *main.children(recursive=True)]
        _, alive = await asyncio.to_thread(psutil.wait_procs, processes, 0)
        assert alive == []

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
    async def test_none_outlives_its_starter(self, tmp_path: Path) -> None:
        start = (
            "import asyncio, os, pathlib, signal, sys\n"
            "from demo.proxies import start_proxies\n"
            "async def main():\n"
            "    proxies = await start_proxies(2, pathlib.Path(sys.argv[1]))\n"
            "    print(*(proxy.pid for proxy in proxies), flush=True)\n"
            "    sys.stdin.read()\n"
            "asyncio.run(main())\n"
        )
        command = [sys.executable, "-c", start, str(tmp_path)]
        starter = await asyncio.to_thread(
            subprocess.Popen, command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with starter:
            assert starter.stdout is not None
            mains = [psutil.Process(int(pid)) for pid in (await asyncio.to_thread(starter.stdout.readline)).split()]
            assert len(mains) == 2
            processes = [process for main in mains for process in (main, *main.children(recursive=True))]
            starter.kill()
            _, alive = await asyncio.to_thread(psutil.wait_procs, processes, 10)
            assert alive == []

    async def test_a_child_of_a_parent_that_is_gone_does_not_start(self) -> None:
        command = child_command("print('started')")
        command[command.index(str(os.getpid()))] = "1"
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout) == (1, "")

    async def test_one_that_cannot_start_says_where_to_look(self, tmp_path: Path) -> None:
        (tmp_path / "proxy-2").mkdir()
        (tmp_path / "proxy-2" / "data").touch()
        with pytest.raises(ChildFailed, match=r"proxy-2 ended with code 1 before it answered; see .*stderr\.log"):
            async with running_proxies(2, tmp_path):
                pass

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
    async def test_a_killed_one_leaves_nothing_behind(self, tmp_path: Path) -> None:
        async with running_proxies(1, tmp_path) as (proxy,):
            main = psutil.Process(proxy.pid)
            processes = [main, *main.children(recursive=True)]
            assert len(processes) > 1
            main.kill()
            _, alive = await asyncio.to_thread(psutil.wait_procs, processes, 10)
            assert alive == []


async def settled(proxy: RunningProxy, client: aiohttp.ClientSession, url: str, at_least: int) -> int:
    """The proxy's count once it has reached a number; each look sends one request more, which gives it time to."""
    for sent in range(1, 200):
        await fetch(client, url)
        if (count := proxy.requests()) >= at_least + sent:
            return count - sent
    pytest.fail(f"the access log did not reach {at_least} lines")


class TestCrawl:
    async def run(
        self,
        site: RunningSite,
        proxy_url: str,
        profile: Path,
        *,
        keyword: str = "json",
        max_pages: int = 3,
        **known: Any,
    ) -> CrawlOutcome:
        on_page = known.pop("on_page", Progress())
        manners = known.pop("manners", Manners(sleep=Pauses()))
        return await crawl(site.url, proxy_url, keyword, max_pages, profile, on_page, manners=manners)

    async def test_products_progress_and_a_jar_that_comes_back(
        self, site: RunningSite, proxy: RunningProxy, client: aiohttp.ClientSession, tmp_path: Path
    ) -> None:
        earlier, already = await visits(site, client), proxy.requests()
        progress, pauses, profile = Progress(), Pauses(), tmp_path / "profile"
        manners = Manners(delay_seconds=0.25, sleep=pauses)
        first = await self.run(site, proxy.endpoint, profile, on_page=progress, manners=manners)
        assert (first.pages, first.errors, first.blocked, first.failed, first.visits) == (3, (), False, False, 1)
        assert first.requests == 5
        assert first.products[0] == Product(
            "json",
            "json",
            "JSON (JavaScript Object Notation) <https://json.org> is a subset of JavaScript syntax "
            "(ECMA-262 3rd edition) used as a lightweight data interchange format.",
            f"{site.url}/json.html",
            1,
        )
        assert [product.rank for product in first.products] == [1, 2, 3]
        assert progress.steps == [(1, 3, 1, 0), (2, 3, 2, 0), (3, 3, 3, 0)]
        assert pauses.seconds == [0.25] * 3

        second = await self.run(site, proxy.endpoint, profile, keyword="socket")
        assert second.visits == 2
        other = await self.run(site, proxy.endpoint, tmp_path / "other")
        assert other.visits == 1
        counts = await visits(site, client)
        assert sorted(counts[sid] for sid in counts if sid not in earlier) == [1, 2]
        assert json.loads((profile / "Local State").read_text())["last_keyword"] == "socket"
        assert sorted(path.name for path in profile.iterdir()) == ["Cookies", "Local State"]
        async with aiohttp.ClientSession(proxy=proxy.endpoint, connector=aiohttp.TCPConnector(force_close=True)) as c:
            sent = already + first.requests + second.requests + other.requests
            assert await settled(proxy, c, f"{site.url}/__visits", sent) in (sent, sent - 1)

    async def test_blocked_after_one_retry(self, busy_site: RunningSite, proxy: RunningProxy, tmp_path: Path) -> None:
        pauses = Pauses()
        outcome = await self.run(busy_site, proxy.endpoint, tmp_path, manners=Manners(sleep=pauses))
        assert (outcome.blocked, outcome.retry_after_seconds, outcome.pages) == (True, 1.0, 0)
        # robots.txt, the search and its retry.
        assert outcome.requests == 3
        assert pauses.seconds == [1.0]

    async def test_a_long_retry_after_is_not_waited_for(
        self, busy_site: RunningSite, proxy: RunningProxy, tmp_path: Path
    ) -> None:
        pauses = Pauses()
        outcome = await self.run(
            busy_site, proxy.endpoint, tmp_path, manners=Manners(max_wait_seconds=0.5, sleep=pauses)
        )
        assert (outcome.blocked, outcome.requests, pauses.seconds) == (True, 2, [])

    async def test_a_page_that_fails_is_passed_over(
        self, site: RunningSite, proxy: RunningProxy, tmp_path: Path
    ) -> None:
        # The listing for this word names a module that can be imported on Windows alone.
        progress = Progress()
        outcome = await self.run(site, proxy.endpoint, tmp_path, keyword="windows", max_pages=8, on_page=progress)
        assert outcome.errors
        assert not outcome.failed
        assert progress.steps[-1][2:] == (len(outcome.products), len(outcome.errors))
        assert outcome.pages == len(outcome.products)

    async def test_a_proxy_that_is_not_there_is_an_error_in_the_outcome(
        self, site: RunningSite, tmp_path: Path
    ) -> None:
        outcome = await self.run(site, "http://127.0.0.1:9", tmp_path)
        assert (outcome.failed, outcome.pages, outcome.requests) == (True, 0, 1)
        assert "ClientProxyConnectionError" in outcome.errors[0]

    async def test_what_the_callback_raises_reaches_the_caller_and_the_jar_is_saved(
        self, site: RunningSite, proxy: RunningProxy, tmp_path: Path
    ) -> None:
        async def lost(*_: int) -> None:
            raise InterruptedError("the lease is lost")

        with pytest.raises(InterruptedError):
            await self.run(site, proxy.endpoint, tmp_path, on_page=lost)
        assert (tmp_path / "Cookies").is_file()

    async def test_max_pages_below_one_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="max_pages is 0"):
            await crawl("http://site", "http://proxy", "json", 0, tmp_path, Progress())


class TestReading:
    @pytest.mark.parametrize(
        ("header", "seconds"),
        [
            ("3", 3.0),
            ("Fri, 20 Nov 2026 12:00:05 GMT", 5.0),
            ("Fri, 20 Nov 2026 11:00:00 GMT", 0.0),
            ("", 1.0),
            ("soon", 1.0),
            ("-4", 1.0),
            ("Fri, 20 Nov 2026 12:00:05", 1.0),
            ("²", 1.0),
        ],
    )
    def test_retry_after(self, header: str, seconds: float) -> None:
        assert retry_after(header, datetime(2026, 11, 20, 12, tzinfo=UTC)) == seconds

    def test_links_stay_on_the_site_and_come_once(self) -> None:
        html = '<a href="x.html"></a><table class="section"><a href="a.html"></a><a href="http://y/b.html"></a>'
        html += '<a href="a.html"></a><a href="b.txt"></a></table>'
        assert result_links(html, "http://site/search?key=k") == ["http://site/a.html"]
        assert result_links("<p>nothing", "http://site/search?key=k") == []

    def test_a_page_without_documentation_has_an_empty_summary(self) -> None:
        html = '<p></p><table class="section"><p><span class="code">of a member</span></p></table>'
        assert read_product(html, "http://site/_x.html", 4) == Product("_x", "_x", "", "http://site/_x.html", 4)

    @pytest.mark.parametrize("content", ["\x80\x04N.", "{", "[]", '{"a": 1}', '{"a|/": {"x": {}}}', "null"])
    async def test_a_jar_that_cannot_be_read_is_a_new_visitor(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "Cookies").write_text(content, encoding="latin-1")
        jar = load_jar(tmp_path)
        assert len(jar) == 0
        save_jar(jar, tmp_path, last_keyword="json")
        assert len(load_jar(tmp_path)) == 0


async def test_the_slots_of_the_demo_are_searchable(site: RunningSite, client: aiohttp.ClientSession) -> None:
    with (ROOT / "demo" / "slots.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48
    assert len({row["external_id"] for row in rows}) == len({row["keyword"] for row in rows}) == 48
    assert len([row for row in rows if row["end_date"] < "2026"]) == 1
    assert all(int(row["setting.max_pages"]) > 0 for row in rows)
    for row in rows:
        url = f"{site.url}/search?key={row['keyword']}"
        assert len(result_links((await fetch(client, url))[1], url)) >= 2, row["keyword"]
