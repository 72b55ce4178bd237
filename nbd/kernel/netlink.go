package kernel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// What linux/nbd-netlink.h calls NBD_CMD_ and NBD_ATTR_. go-nbd, where the
// protocol's constants come from, knows the older ioctl interface only.
const (
	familyName  = "nbd"
	groupName   = "nbd_mc_group"
	genlVersion = 1

	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3
	cmdLinkDead    = 4
	cmdStatus      = 5

	attrIndex      = 1
	attrSize       = 2
	attrBlockSize  = 3
	attrTimeout    = 4 // seconds
	attrServer     = 5 // the export's transmission flags
	attrClient     = 6
	attrSockets    = 7
	attrDeadConn   = 8 // seconds
	attrDevices    = 9
	attrIdentifier = 10

	itemAttr     = 1 // of attrSockets and attrDevices
	sockFD       = 1
	devIndex     = 1
	devConnected = 2
)

var native = binary.NativeEndian

// family finds the kernel's NBD, loading the module if it is one.
func family() (*netlink.GenlFamily, error) {
	f, err := netlink.GenlFamilyGet(familyName)
	if err == nil {
		return f, nil
	}
	out, merr := exec.Command("modprobe", "nbd").CombinedOutput()
	if merr == nil {
		if f, err = netlink.GenlFamilyGet(familyName); err == nil {
			return f, nil
		}
	}
	return nil, status.Errorf(status.Unsupported, "this kernel has no NBD devices (%w; modprobe nbd: %w, %.200s): attach the volume to a VM instead, or install the kernel's nbd module", err, merr, bytes.TrimSpace(out))
}

// message is one request to the kernel.
type message struct {
	family *netlink.GenlFamily
	cmd    uint8
	attrs  []nl.NetlinkRequestData
}

func (m *message) u32(attr int, v uint32) {
	m.attrs = append(m.attrs, nl.NewRtAttr(attr, nl.Uint32Attr(v)))
}

func (m *message) u64(attr int, v uint64) {
	m.attrs = append(m.attrs, nl.NewRtAttr(attr, nl.Uint64Attr(v)))
}

// identifier names what the device is attached to. The kernel keeps it, shows
// it in /sys, and changes nothing for somebody who does not know it.
func (m *message) identifier(uri string) {
	m.attrs = append(m.attrs, nl.NewRtAttr(attrIdentifier, append([]byte(uri), 0)))
}

func (m *message) seconds(attr int, d time.Duration) { m.u64(attr, uint64(d/time.Second)) }

func (m *message) sockets(files []*os.File) {
	list := nl.NewRtAttr(attrSockets, nil)
	for _, f := range files {
		list.AddRtAttr(itemAttr, nil).AddRtAttr(sockFD, nl.Uint32Attr(uint32(f.Fd())))
	}
	m.attrs = append(m.attrs, list)
}

// do sends the message and returns the attributes of the answers.
func (m *message) do() ([]attribute, error) {
	req := nl.NewNetlinkRequest(int(m.family.ID), unix.NLM_F_ACK)
	req.AddData(&nl.Genlmsg{Command: m.cmd, Version: genlVersion})
	for _, a := range m.attrs {
		req.AddData(a)
	}
	replies, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return nil, kindOf(err)
	}
	var out []attribute
	for _, b := range replies {
		if len(b) < nl.SizeofGenlmsg {
			return nil, status.Errorf(status.Internal, "the kernel's NBD answered with %d bytes", len(b))
		}
		as, err := parse(b[nl.SizeofGenlmsg:])
		if err != nil {
			return nil, err
		}
		out = append(out, as...)
	}
	return out, nil
}

// kindOf keeps the kernel's error number and adds a kind.
func kindOf(err error) error {
	k := status.IO
	for errno, kind := range map[unix.Errno]status.Kind{unix.EPERM: status.Permission, unix.EACCES: status.Permission, unix.EBUSY: status.Held,
		unix.ENOENT: status.NotFound, unix.EINVAL: status.Invalid, unix.ENOSPC: status.NoSpace} {
		if errors.Is(err, errno) {
			k = kind
		}
	}
	return status.Errorf(k, "the kernel's NBD refuses: %w", err)
}

// attribute is one netlink attribute: type and payload.
type attribute struct {
	kind int
	data []byte
}

// parse reads a run of attributes:
//
//	0  u16 length, header included   2  u16 type   4  payload, padded to 4 bytes
func parse(b []byte) ([]attribute, error) {
	var out []attribute
	for len(b) >= 4 {
		n := int(native.Uint16(b))
		if n < 4 || n > len(b) {
			return nil, status.Errorf(status.Internal, "an attribute of the kernel's NBD has %d of %d bytes", n, len(b))
		}
		out = append(out, attribute{int(native.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)), b[4:n]})
		b = b[min(len(b), (n+3)&^3):]
	}
	return out, nil
}

// find returns the first attribute of a kind.
func find(as []attribute, kind, size int) ([]byte, bool) {
	for _, a := range as {
		if a.kind == kind && len(a.data) >= size {
			return a.data, true
		}
	}
	return nil, false
}

// connections is what NBD_CMD_STATUS tells: by index, whether it is connected.
func connections(f *netlink.GenlFamily) (map[int]bool, error) {
	m := message{family: f, cmd: cmdStatus}
	as, err := m.do()
	if err != nil {
		return nil, err
	}
	return parseStatus(as)
}

func parseStatus(as []attribute) (map[int]bool, error) {
	out := map[int]bool{}
	list, ok := find(as, attrDevices, 0)
	if !ok {
		return out, nil
	}
	items, err := parse(list)
	if err != nil {
		return nil, err
	}
	for _, item := range items {
		fields, err := parse(item.data)
		if err != nil {
			return nil, err
		}
		index, ok1 := find(fields, devIndex, 4)
		up, ok2 := find(fields, devConnected, 1)
		if ok1 && ok2 {
			out[int(int32(native.Uint32(index)))] = up[0] != 0
		}
	}
	return out, nil
}

// events is a subscription to the kernel's news of dead connections.
type events struct{ f *os.File }

// subscribe listens to the family's group.
func subscribe(f *netlink.GenlFamily) (*events, error) {
	group := uint32(0)
	for _, g := range f.Groups {
		if g.Name == groupName {
			group = g.ID
		}
	}
	if group == 0 {
		return nil, status.Errorf(status.Unsupported, "this kernel's NBD tells nobody of dead connections")
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_GENERIC)
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket: %w", err)
	}
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, int(group))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen to the kernel's NBD: %w", err), unix.Close(fd))
	}
	return &events{os.NewFile(uintptr(fd), "nbd events")}, nil
}

// dead waits for news and says which device's connection died; -1 when the
// message is none of these, or some were lost.
func (e *events) dead() (int, error) {
	buf := make([]byte, 4096)
	n, err := e.f.Read(buf)
	if errors.Is(err, unix.ENOBUFS) {
		return -1, nil
	}
	if err != nil {
		return -1, err
	}
	return parseDead(buf[:n]), nil
}

func parseDead(b []byte) int {
	const head = unix.NLMSG_HDRLEN + nl.SizeofGenlmsg
	if len(b) < head || b[unix.NLMSG_HDRLEN] != cmdLinkDead {
		return -1
	}
	as, err := parse(b[head:])
	if err != nil {
		return -1
	}
	if index, ok := find(as, attrIndex, 4); ok {
		return int(int32(native.Uint32(index)))
	}
	return -1
}

func (e *events) close() error { return e.f.Close() }
