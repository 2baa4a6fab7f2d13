"""Checks whether an address belongs to the public internet.

The table is here because the standard library's ``is_global`` differs between Python releases. It contains every block
of the IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890, RFC 8190; as of 2025), including globally
reachable ones such as AS112's, which host no images. IPv6 addresses outside global unicast (2000::/3), the only
allocated range, are refused, and with them mapped, compatible and translated IPv4 addresses. 6to4, Teredo and ISATAP
embed IPv4 addresses within 2000::/3.
"""

import ipaddress

_IPV4 = (
    "0.0.0.0/8",  # this network
    "10.0.0.0/8",  # private use
    "100.64.0.0/10",  # shared address space (CGNAT)
    "127.0.0.0/8",  # loopback
    "169.254.0.0/16",  # link-local
    "172.16.0.0/12",  # private use
    "192.0.0.0/24",  # IETF protocol assignments
    "192.0.2.0/24",  # documentation
    "192.31.196.0/24",  # AS112
    "192.52.193.0/24",  # AMT
    "192.88.99.0/24",  # 6to4 relay anycast, deprecated
    "192.168.0.0/16",  # private use
    "192.175.48.0/24",  # AS112
    "198.18.0.0/15",  # benchmarking
    "198.51.100.0/24",  # documentation
    "203.0.113.0/24",  # documentation
    "224.0.0.0/4",  # multicast (RFC 5771)
    "240.0.0.0/4",  # reserved, limited broadcast
)
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
# Blocks within 2000::/3; the rest of the registry is outside it.
_IPV6 = (
    "2001::/23",  # IETF protocol assignments: Teredo, benchmarking, AMT, ORCHID and others
    "2001:db8::/32",  # documentation
    "2002::/16",  # 6to4
    "2620:4f:8000::/48",  # AS112
    "3fff::/20",  # documentation
)
_IPV4_BLOCKS = tuple(map(ipaddress.IPv4Network, _IPV4))
_IPV6_BLOCKS = tuple(map(ipaddress.IPv6Network, _IPV6))

# Bits 64 to 95 of an address with an embedded IPv4 address (RFC 5214); the second for globally unique ones.
_ISATAP = (0x00005EFE, 0x02005EFE)


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet and embeds no other address.

    Raises:
        ValueError: not an address.
    """
    ip = ipaddress.ip_address(address.split("%")[0])
    if ip.version == 4:
        return not any(ip in block for block in _IPV4_BLOCKS)
    if ip not in _GLOBAL_UNICAST or any(ip in block for block in _IPV6_BLOCKS):
        return False
    return int(ip) >> 32 & 0xFFFFFFFF not in _ISATAP
