"""Sockets of every family, and other ways to talk to processes outside."""

import ctypes
import errno
import os
import socket
import struct

from . import Impossible, Target, attempt
from .kernel import by_32_bits, canary, if_built, libc, number, syscall

NO_FAMILY = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT)


def _open(family: int, kind: int, protocol: int = 0, *impossible: int) -> socket.socket:
    return if_built(lambda: socket.socket(family, kind, protocol), *NO_FAMILY, *impossible)


def _hello(connection: socket.socket) -> bool:
    """Whether the server outside answers."""
    connection.settimeout(1)
    connection.sendall(b"hello")
    return canary(connection.recv(64))


# ---- the internet's


@attempt
def connect_by_tcp(target: Target):
    with socket.create_connection(("127.0.0.1", target.ports["tcp"]), 1) as connection:
        return _hello(connection)


@attempt
def connect_by_tcp_over_ipv6(target: Target):
    if "tcp6" not in target.ports:
        raise Impossible("there is no IPv6")
    with socket.create_connection(("::1", target.ports["tcp6"]), 1) as connection:
        return _hello(connection)


@attempt
def connect_by_mapped_address(target: Target):
    """IPv4 through a socket of the family for IPv6."""
    if "tcp6" not in target.ports:
        raise Impossible("there is no IPv6")
    with _open(socket.AF_INET6, socket.SOCK_STREAM) as connection:
        connection.connect(("::ffff:127.0.0.1", target.ports["tcp"]))
        return _hello(connection)


@attempt
def connect_by_fast_open(target: Target):
    """`sendto` with MSG_FASTOPEN connects without `connect`."""
    with _open(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.sendto(b"hello", socket.MSG_FASTOPEN, ("127.0.0.1", target.ports["tcp"]))
        return canary(connection.recv(64))


@attempt
def connect_by_multipath_tcp(target: Target):
    with _open(socket.AF_INET, socket.SOCK_STREAM, 262, errno.ENOPROTOOPT) as connection:
        connection.connect(("127.0.0.1", target.ports["tcp"]))
        return _hello(connection)


@attempt
def connect_by_name(target: Target):
    with socket.create_connection(("localhost", target.ports["tcp"]), 1) as connection:
        return _hello(connection)


@attempt
def connect_by_http_library(target: Target):
    import urllib.request

    proxies = urllib.request.ProxyHandler({})
    address = f"http://127.0.0.1:{target.ports['tcp']}/"
    with urllib.request.build_opener(proxies).open(address, timeout=1) as answer:
        return answer.status == 200


@attempt
def send_by_udp(target: Target):
    with _open(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.settimeout(1)
        sender.sendto(b"hello", ("127.0.0.1", target.ports["udp"]))
        return canary(sender.recv(64))


@attempt
def ask_name_server(target: Target):
    """A question of DNS carries data out by itself; here a server of the test's answers it."""
    question = struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + b"\6secret\7example\0" + struct.pack(">HH", 1, 1)
    with _open(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.settimeout(1)
        asker.connect(("127.0.0.1", target.ports["udp"]))
        asker.send(question)
        return canary(asker.recv(64))


@attempt
def listen_on_tcp(target: Target):
    with _open(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        return server.getsockname()[1]


@attempt
def listen_without_bind(target: Target):
    with _open(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.listen()
        return server.getsockname()[1]


@attempt
def listen_on_udp(target: Target):
    with _open(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("0.0.0.0", 0))
        return server.getsockname()[1]


@attempt
def open_raw_socket(target: Target):
    return _open(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP, errno.EPERM)


@attempt
def open_ping_socket(target: Target):
    return _open(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP, errno.EACCES)


@attempt
def open_sctp_socket(target: Target):
    return _open(socket.AF_INET, socket.SOCK_STREAM, 132)


@attempt
def open_udplite_socket(target: Target):
    return _open(socket.AF_INET, socket.SOCK_DGRAM, 136)


# ---- the machine's


@attempt
def connect_by_unix_path(target: Target):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(target.unix)
        return _hello(connection)


@attempt
def connect_by_unix_path_through_symlink(target: Target):
    os.symlink(target.unix, target.scratch_path())
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.path.relpath(target.scratch_path()))
        return _hello(connection)


@attempt
def connect_by_socket_in_model_folder(target: Target):
    """A socket file in a folder that may be read, as D-Bus and agents leave them."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.path.join(target.folder, "agent"))
        return _hello(connection)


@attempt
def connect_by_abstract_name(target: Target):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"\0{target.abstract}")
        return _hello(connection)


@attempt
def send_to_abstract_name(target: Target):
    """As to a system log: no connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        return sender.sendto(b"hello", f"\0{target.abstract}-datagrams")


@attempt
def send_from_half_of_a_pair(target: Target):
    """A socket pair may be used inside; its halves must not be turned to another address."""
    half, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return half.sendto(b"hello", f"\0{target.abstract}-datagrams")


@attempt
def turn_half_of_a_pair_to_another_address(target: Target):
    half, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    half.connect(f"\0{target.abstract}-datagrams")
    return half.send(b"hello")


@attempt
def send_many_messages_to_abstract_name(target: Target):
    """sendmmsg, beside sendmsg and sendto."""
    half, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    address = f"\0{target.abstract}-datagrams".encode()
    name = ctypes.create_string_buffer(struct.pack("H", socket.AF_UNIX) + address)
    text = ctypes.create_string_buffer(b"hello")
    parts = (ctypes.c_size_t * 2)(ctypes.addressof(text), 5)
    message = struct.pack(
        "PI4xPNPNi4xI4x", ctypes.addressof(name), 2 + len(address), ctypes.addressof(parts), 1, 0, 0, 0, 0
    )
    sent = libc.sendmmsg(half.fileno(), ctypes.create_string_buffer(message), 1, 0)
    if sent < 0:
        raise OSError(ctypes.get_errno(), "sendmmsg")
    return sent == 1


@attempt
def send_message_to_abstract_name(target: Target):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        return sender.sendmsg([b"hello"], [], 0, f"\0{target.abstract}-datagrams")


@attempt
def receive_descriptor(target: Target):
    """The server outside hands over an open file."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1)
        connection.connect(target.unix)
        connection.sendall(b"file")
        _, descriptors, _, _ = socket.recv_fds(connection, 64, 1)
        return canary(os.pread(descriptors[0], 64, 0))


@attempt
def talk_over_inherited_socket(target: Target):
    inherited = socket.socket(fileno=os.dup(target.descriptors["socket"]))
    return _hello(inherited)


@attempt
def listen_on_abstract_name(target: Target):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{target.marker}")
        server.listen()
        return True


@attempt
def read_interfaces_by_netlink(target: Target):
    with _open(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
        link.settimeout(1)
        link.send(struct.pack("IHHIIB3x", 20, 18, 0x301, 1, 0, 0))  # RTM_GETLINK, all
        return len(link.recv(65536)) > 20


@attempt
def listen_to_kernel_events(target: Target):
    return _open(socket.AF_NETLINK, socket.SOCK_RAW, 15, errno.EPERM)  # NETLINK_KOBJECT_UEVENT


@attempt
def list_sockets_by_netlink(target: Target):
    """NETLINK_SOCK_DIAG: every connection of the machine."""
    return _open(socket.AF_NETLINK, socket.SOCK_RAW, 4)


@attempt
def name_interfaces_by_ioctl(target: Target):
    return [name for _, name in socket.if_nameindex() if name != "lo"] or socket.if_nameindex()


@attempt
def open_packet_socket(target: Target):
    return _open(17, socket.SOCK_RAW, 0, errno.EPERM)


@attempt
def open_vsock(target: Target):
    """To the host of a virtual machine."""
    return _open(40, socket.SOCK_STREAM)


@attempt
def open_bluetooth(target: Target):
    return _open(31, socket.SOCK_RAW, 1)


@attempt
def open_crypto_socket(target: Target):
    """AF_ALG, the door of several holes in the kernel."""
    return _open(38, 5)


@attempt
def open_other_families(target: Target):
    """AX.25, X.25, AF_KEY, PPPoX, CAN, TIPC, RxRPC, SMC, XDP."""
    opened = []
    for family, kind, protocol in (
        (3, 2, 0), (9, 5, 0), (15, 3, 2), (24, 2, 0), (29, 3, 1), (30, 5, 0), (33, 2, 2), (43, 1, 0), (44, 3, 0),
    ):  # fmt: skip
        try:
            opened.append(socket.socket(family, kind, protocol).family)
        except OSError as error:
            reason = error
    if not opened and reason.errno in (*NO_FAMILY, errno.EPERM, errno.EINVAL):
        raise Impossible("the kernel has none of them")
    return opened


@attempt
def open_socket_by_number(target: Target):
    """Past every layer of Python."""
    return syscall("socket", int(socket.AF_INET), int(socket.SOCK_STREAM), 0)


@attempt
def open_socket_by_32_bit_call(target: Target):
    """A filter that knows only the 64-bit numbers lets it through."""
    try:
        child = os.fork()  # a kernel without the interface sends a signal
        if not child:
            try:
                os._exit(77 if by_32_bits(359, socket.AF_INET, socket.SOCK_STREAM, 0) >= 0 else 1)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BlockingIOError:
        return by_32_bits(359, socket.AF_INET, socket.SOCK_STREAM, 0)
    if status < 0:
        raise Impossible("the kernel has no 32-bit calls")
    return status == 77


@attempt
def open_socket_by_x32_call(target: Target):
    x32 = 0x40000000
    result = libc.syscall(ctypes.c_long(x32 | number("socket")), socket.AF_INET, socket.SOCK_STREAM, 0)
    if result < 0:
        code = ctypes.get_errno()
        raise (Impossible("the kernel has no x32 calls") if code == errno.ENOSYS else OSError(code, "x32"))
    return True


@attempt
def open_socket_by_io_uring(target: Target):
    """A ring makes system calls in the kernel, where no filter sees them."""
    parameters = ctypes.create_string_buffer(120)
    return if_built(lambda: syscall("io_uring_setup", 4, parameters), errno.EPERM) > 0
