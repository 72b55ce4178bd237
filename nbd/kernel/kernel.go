// Package kernel makes exports block devices of this machine's kernel, by
// generic netlink, and keeps them connected.
//
// Duty: attach and detach /dev/nbdN over several connections, dial again those
// that die, tell the kernel a new size, list what is attached (the kernel
// itself holds the state: no file of ours can disagree with it). Floor: F4. It
// serves nothing and moves no data: the kernel does, over the sockets it was
// given.
//
// # How a device survives its server
//
// The kernel keeps requests of a dead connection and sends them over another
// one; when none is left it waits DeadTimeout for Keep to bring new ones
// (NBD_CMD_RECONFIGURE). What was in flight on a connection that died is sent
// again once it is Timeout old, and so is a request that was not answered for
// that long. The server hangs up, with all bytes unread, on a
// connection it could not read for a third of that (nbd/server's Unread), and
// here a TCP connection that cannot reach the server dies as early: what a
// connection given up has still in its queue never arrives behind newer data.
package kernel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/proto/status"
)

// Config says what to attach, and how patient the kernel is to be.
type Config struct {
	URI         string
	Index       int           // of /dev/nbdN; negative: the first that is free
	Connections int           // default 4; 1 if the server does not allow several
	Timeout     time.Duration // of one request, before it is sent again elsewhere (default 12 s)
	DeadTimeout time.Duration // how long requests wait when no connection is left (default 10 min)
	Log         *slog.Logger  // of Keep; nil: silent
}

const (
	maxConnections = 16
	dialWait       = 10 * time.Second
	// peerTimeout ends a TCP connection whose server cannot be reached: half the
	// default Timeout, so that what it holds is gone when it is sent again.
	peerTimeout = 6 * time.Second
	followEvery = 2 * time.Second // Keep looks at the size, and for what it was not told
)

func (c *Config) defaults() error {
	if c.Connections == 0 {
		c.Connections = 4
	}
	if c.Timeout == 0 {
		c.Timeout = 12 * time.Second
	}
	if c.DeadTimeout == 0 {
		c.DeadTimeout = 10 * time.Minute
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case c.Connections < 0 || c.Connections > maxConnections:
		return status.Errorf(status.Invalid, "%d connections: 1 to %d are possible", c.Connections, maxConnections)
	case c.Timeout < 3*time.Second || c.DeadTimeout < time.Second:
		return status.Errorf(status.Invalid, "timeouts of %v and %v: a request's must be at least 3 s, the one for dead connections 1 s", c.Timeout, c.DeadTimeout)
	}
	return nil
}

// Device is an attached block device.
type Device struct {
	Index     int
	Path      string // /dev/nbdN
	URI       string // "": attached by somebody else, or the kernel is older than 5.14
	SizeBytes uint64
}

func path(index int) string { return fmt.Sprintf("/dev/nbd%d", index) }

// sys is a file of the device in /sys.
func sys(index int, name string) string {
	return filepath.Join("/sys/block", fmt.Sprintf("nbd%d", index), name)
}

// Attach connects a device and returns it. Whoever calls it has to see to it
// that Keep runs.
func Attach(ctx context.Context, cfg Config) (Device, error) {
	if err := cfg.defaults(); err != nil {
		return Device{}, err
	}
	f, err := family()
	if err != nil {
		return Device{}, err
	}
	files, x, err := dialAll(ctx, cfg)
	defer closeAll(files)
	if err != nil {
		return Device{}, err
	}
	m := message{family: f, cmd: cmdConnect}
	if cfg.Index >= 0 {
		m.u32(attrIndex, uint32(cfg.Index))
	}
	m.u64(attrSize, x.Size)
	m.u64(attrBlockSize, blockSize(x.Size))
	m.u64(attrServer, uint64(x.Flags))
	m.u64(attrClient, 0)
	m.seconds(attrTimeout, cfg.Timeout)
	m.seconds(attrDeadConn, cfg.DeadTimeout)
	m.sockets(files)
	m.identifier(cfg.URI)
	as, err := m.do()
	if errors.Is(err, status.Held) {
		return Device{}, status.Errorf(status.Held, "%s is in use: choose another device, or none", path(cfg.Index))
	}
	if err != nil {
		return Device{}, err
	}
	index, ok := find(as, attrIndex, 4)
	if !ok {
		return Device{}, status.Errorf(status.Internal, "the kernel attached an NBD device and did not say which")
	}
	i := int(int32(native.Uint32(index)))
	return Device{Index: i, Path: path(i), URI: cfg.URI, SizeBytes: x.Size}, nil
}

// blockSize is the device's logical block: cairn's, if the size allows.
func blockSize(size uint64) uint64 {
	if size%nbd.PreferBlock == 0 {
		return nbd.PreferBlock
	}
	return 512
}

// dialAll opens the export as often as it may be.
func dialAll(ctx context.Context, cfg Config) (files []*os.File, x nbd.Export, err error) {
	for n := 0; n < cfg.Connections; n++ {
		f, got, err := dial(ctx, cfg.URI)
		if err != nil {
			return files, x, err
		}
		files = append(files, f)
		if x = got; x.Flags&nbd.CanMultiConn == 0 {
			break
		}
	}
	return files, x, nil
}

// dial opens the export for the kernel.
func dial(ctx context.Context, uri string) (*os.File, nbd.Export, error) {
	ctx, cancel := context.WithTimeout(ctx, dialWait)
	defer cancel()
	nc, x, err := client.Handover(ctx, uri)
	if err != nil {
		return nil, x, err
	}
	f, err := fileOf(nc)
	if err = errors.Join(err, nc.Close()); err != nil { // the file is another descriptor of the connection
		return nil, x, fmt.Errorf("hand %s over to the kernel: %w", uri, err)
	}
	return f, x, nil
}

// fileOf is the connection's socket. A TCP one is made to end before its
// requests are sent again over another.
func fileOf(nc net.Conn) (*os.File, error) {
	switch c := nc.(type) {
	case *net.UnixConn:
		return c.File()
	case *net.TCPConn:
		if err := c.SetNoDelay(true); err != nil {
			return nil, err
		}
		if err := c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 2 * time.Second, Interval: time.Second, Count: 4}); err != nil {
			return nil, err
		}
		f, err := c.File()
		if err != nil {
			return nil, err
		}
		if err := unix.SetsockoptInt(int(f.Fd()), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(peerTimeout.Milliseconds())); err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return f, nil
	}
	return nil, status.Errorf(status.Unsupported, "a %T cannot be given to the kernel", nc)
}

// closeAll lets go of sockets: the kernel holds its own references.
func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // nothing was written through it
	}
}

// Devices lists the connected devices.
func Devices() ([]Device, error) {
	f, err := netlink.GenlFamilyGet(familyName)
	if err != nil {
		return nil, nil // no NBD in this kernel, or its module is not loaded: none is attached
	}
	up, err := connections(f)
	if err != nil {
		return nil, err
	}
	var out []Device
	for index, connected := range up {
		if !connected {
			continue
		}
		d := Device{Index: index, Path: path(index)}
		if b, err := os.ReadFile(sys(index, "backend")); err == nil {
			d.URI = strings.TrimSpace(string(b))
		}
		if d.SizeBytes, err = sizeOf(index); err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Index < out[j].Index })
	return out, nil
}

// sizeOf is the size the kernel's users see.
func sizeOf(index int) (uint64, error) {
	b, err := os.ReadFile(sys(index, "size"))
	if err != nil {
		return 0, fmt.Errorf("read the size of %s: %w", path(index), err)
	}
	sectors, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	return sectors * 512, err
}

// ParseDevice reads /dev/nbdN, nbdN or N.
func ParseDevice(s string) (int, error) {
	n := strings.TrimPrefix(strings.TrimPrefix(s, "/dev/"), "nbd")
	i, err := strconv.ParseUint(n, 10, 20)
	if err != nil {
		return 0, status.Errorf(status.Invalid, "%q is no NBD device: write /dev/nbd0", s)
	}
	return int(i), nil
}

// Detach disconnects a device: what is in flight gets an error, so its users
// have to be gone. It returns when the kernel has let go.
func Detach(ctx context.Context, index int) error {
	f, err := family()
	if err != nil {
		return err
	}
	m := message{family: f, cmd: cmdDisconnect}
	m.u32(attrIndex, uint32(index))
	if _, err := m.do(); err != nil {
		if k := status.Of(err); k == status.NotFound || k == status.Invalid {
			return status.Errorf(status.NotFound, "%s is not attached", path(index))
		}
		return err
	}
	for {
		up, err := connections(f)
		if err != nil || !up[index] {
			return err
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return status.Errorf(status.Timeout, "%s is still being disconnected: %w", path(index), ctx.Err())
		}
	}
}
