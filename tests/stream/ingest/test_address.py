from __future__ import annotations

import errno
import socket
import threading
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.ingest.address import AddressGuard, Forbidden, NotAnAddress, connect, endpoints, parse_address


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("rtsp://camera/x", "camera", 554),
        ("rtsp://u:p@camera.example.:8554/x?y=1", "camera.example", 8554),
        ("rtsp://good@evil/", "evil", 554),
        ("rtsp://good.example:80@evil.example:81/", "evil.example", 81),
        ("rtsp://[::FFFF:127.0.0.1]/", str(ip_address("::ffff:127.0.0.1")), 554),
        ("rtsp://10.0.0.7", "10.0.0.7", 554),
        ("RTSP://Camera_1.Example/x", "camera_1.example", 554),
    ],
)
def test_the_host_is_what_comes_after_the_user_info(url: str, host: str, port: int) -> None:
    address = parse_address(url, 554)
    assert (address.host, address.port) == (host, port)


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://good@evil@other/",
        "rtsp://good\\@evil/",
        "rtsp://evil#@good/",
        "rtsp://evil?@good/",
        "rtsp://evil/x#y",
        "rtsp://[fe80::1%25eth0]/",
        "rtsp://[fe80::1%eth0]/",
        "rtsp://[127.0.0.1]/",
        "rtsp://[::1/",
        "rtsp://2130706433/",
        "rtsp://0x7f000001/",
        "rtsp://0177.0.0.1/",
        "rtsp://127.1/",
        "rtsp://127.0.0.0x1/",
        "rtsp://1.2.3.4.5/",
        "rtsp://\uff11\uff12\uff17.0.0.1/",
        "rtsp://127\u30020\u30020\u30021/",
        "rtsp://ev%69l/",
        "rtsp://a..b/",
        "rtsp://.a/",
        "rtsp://a../",
        "rtsp:///x",
        "rtsp://@/x",
        "rtsp://host:0/",
        "rtsp://host:65536/",
        "rtsp://host:\uff11/",
        "rtsp://ho st/",
        "rtsp://host/\r\nX: y",
        "rtsp://host/a b",
        "rtsp://host/\x00",
        "rtsp:host/",
        "//host/",
        "",
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(url: str) -> None:
    with pytest.raises(NotAnAddress):
        parse_address(url, 554)


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_login_survives_a_rebuilt_url(user: str, password: str) -> None:
    url = f"rtsp://{quote(user, safe='')}:{quote(password, safe='')}@cam:99/path?x=1"
    address = parse_address(url, 554)
    assert (address.user, address.password) == (user, password)
    again = parse_address(address.url(authority="127.0.0.1:7"), 554)
    assert (again.user, again.password, again.host, again.port, again.path) == (
        user,
        password,
        "127.0.0.1",
        7,
        "/path?x=1",
    )
    assert repr(address) == "Address(scheme='rtsp', host='cam', port=99, path='/path?x=1')"


SPECIAL = [
    "0.0.0.0",
    "0.1.2.3",
    "127.0.0.1",
    "127.255.255.255",
    "169.254.169.254",
    "169.254.1.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "100.100.100.200",
    "168.63.129.16",
    "::",
    "::1",
    "fe80::1",
    "febf::1",
    "ff02::1",
    "fd00:ec2::254",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::127.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
    "2001:0:7f00:1::1",
]


@pytest.mark.parametrize("ip", SPECIAL)
def test_this_machine_its_links_and_metadata_are_refused_whatever_networks_are_allowed(ip: str) -> None:
    everything = AddressGuard([ip_network("0.0.0.0/0"), ip_network("::/0")])
    assert not AddressGuard().allows(ip_address(ip))
    assert not everything.allows(ip_address(ip))


@pytest.mark.parametrize(
    "ip", ["10.0.0.1", "172.16.3.4", "192.168.1.64", "8.8.8.8", "fd12::1", "2a00::1", "::ffff:10.1.1.1"]
)
def test_private_and_public_addresses_are_allowed(ip: str) -> None:
    assert AddressGuard().allows(ip_address(ip))


def test_networks_narrow_and_open_what_they_name_closely() -> None:
    guard = AddressGuard([ip_network("192.168.7.0/24"), ip_network("127.0.0.0/8"), ip_network("169.254.169.254/32")])
    allowed = {"192.168.7.9", "127.0.0.1", "::ffff:127.0.0.1", "169.254.169.254"}
    refused = {"192.168.8.1", "8.8.8.8", "::1", "fd00:ec2::254", "169.254.1.1", "::ffff:8.8.8.8"}
    assert {ip for ip in allowed | refused if guard.allows(ip_address(ip))} == allowed


@given(st.ip_addresses(v=4))
def test_an_address_wrapped_into_ipv6_is_judged_like_itself(ip: Any) -> None:
    guard = AddressGuard()
    number = int(ip)
    wrapped = [
        f"::ffff:{ip}",
        str(ip_address((0x64FF9B << 96) + number)),
        str(ip_address((0x2002 << 112) + (number << 80))),
    ]
    assert {guard.allows(ip_address(text)) for text in wrapped} == {guard.allows(ip)}


def test_a_name_is_resolved_once_and_only_allowed_addresses_are_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def resolver(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        # A name that means a camera for the check, and this machine for the connection.
        answers = ["192.168.1.5", "127.0.0.1"] if len(asked) == 1 else ["127.0.0.1"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in answers]

    tried: list[Any] = []

    class Refusing(socket.socket):
        def connect_ex(self, address: Any) -> int:
            tried.append(address)
            return errno.ECONNREFUSED

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    monkeypatch.setattr(socket, "socket", Refusing)
    with pytest.raises(ConnectionRefusedError):
        connect("rebinding.example", 554, AddressGuard(), 1.0, threading.Event())
    assert (asked, tried) == (["rebinding.example"], [("192.168.1.5", 554)])
    with pytest.raises(Forbidden, match=r"rebinding\.example is at 127\.0\.0\.1"):
        connect("rebinding.example", 554, AddressGuard(), 1.0, threading.Event())
    assert len(tried) == 1


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_names_of_this_machine_are_refused(host: str) -> None:
    with pytest.raises(Forbidden):
        endpoints(host, 554, AddressGuard())
    assert endpoints(host, 554, None)


def test_a_zone_is_never_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd12::1%eth0", 554, 0, 2))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(Forbidden):
        endpoints("camera", 554, AddressGuard())
