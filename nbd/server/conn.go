package server

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/socket"
	"github.com/cairnstore/cairn/proto/status"
)

// conn is one client's connection. The reader goroutine (run) owns what has no
// other owner named.
type conn struct {
	s    *Server
	nc   net.Conn // the TLS connection once there is one
	addr string
	age  uint64
	open bool // transmission has begun; guarded by s.mu, like name before it

	who     Identity
	name    string
	vol     Volume
	access  Access // of who to vol; with the volume's own say it decides about writes
	door    nbd.Door
	out     *socket.Outbox
	freezes uint64        // of the server, when the connection came: before a client can have sent a request
	readAt  time.Duration // when the last read returned

	buf      []byte // received: buf[r:w] is not yet taken
	r, w     int
	batch    []*request   // decoded, to be submitted
	ops      []*volume.Op // scratch: the batch's operations
	answered []*request   // decoded and settled at the door

	mu       sync.Mutex // guards what follows
	moved    sync.Cond  // L is mu: something was released or completed
	inFlight map[*volume.Op]*request
	requests int        // read, not yet answered into the kernel: ≤ MaxRequests
	bytes    int        // their data: ≤ MaxBytes
	stats    *nbd.Stats // nil during the handshake
	leaving  leave
	waiting  bool // the reader waits for its budget
	stalled  bool // ... and has for too long
}

// leave is how a connection comes to its end from this side.
type leave uint8

const (
	staying       leave = iota
	leaveRefusing       // read on while requests are in flight, answer ESHUTDOWN
	leaveSilently       // read no more
)

// Reasons to end a connection that are nobody's failure.
var (
	errBye     = errors.New("the client said goodbye")
	errLeaving = errors.New("this side is leaving")
)

// run is the life of a connection.
func (c *conn) run() {
	defer c.s.ended(c)
	err := c.handshake()
	if err == nil {
		c.s.log.Debug("nbd: client connected", "peer", c.addr, "export", c.name)
		err = c.serve()
	}
	switch {
	case err == nil || errors.Is(err, errBye) || errors.Is(err, errLeaving) || isPeerGone(err):
		c.s.log.Debug("nbd: client gone", "peer", c.addr, "export", c.name, "why", err)
	default:
		c.s.log.Warn("nbd: connection closed", "peer", c.addr, "export", c.name, "why", err)
	}
}

// handshake negotiates until an export is chosen. Nothing is read beyond the
// option at hand, so what a client sends too early is never taken for what it
// is not: before a TLS handshake it spoils that, else it waits for its turn.
func (c *conn) handshake() error {
	// The deadline also stands on the old connection inside TLS.
	if err := c.nc.SetDeadline(time.Now().Add(c.s.cfg.Handshake)); err != nil {
		return err
	}
	if c.left() {
		return errLeaving
	}
	c.who = identify(c.nc)
	n := &nbd.Negotiation{TLS: c.tlsRule(), List: c.list, Lookup: c.lookup}
	if _, err := c.nc.Write(nbd.AppendGreeting(nil, nbd.FlagFixedNewstyle|nbd.FlagNoZeroes)); err != nil {
		return err
	}
	var head [nbd.OptionHeaderSize]byte
	if _, err := io.ReadFull(c.nc, head[:nbd.ClientFlagsSize]); err != nil {
		return err
	}
	if err := n.ClientFlags(head[:]); err != nil {
		return err
	}
	for {
		next, err := c.option(n, head[:])
		if err != nil {
			return err
		}
		switch next {
		case nbd.NextClose:
			return errBye
		case nbd.NextTLS:
			if err := c.startTLS(); err != nil {
				return err
			}
			n = n.Secured()
		case nbd.NextTransmit:
			return c.begin(n)
		}
	}
}

// option reads one option and answers it.
func (c *conn) option(n *nbd.Negotiation, head []byte) (nbd.Next, error) {
	if _, err := io.ReadFull(c.nc, head); err != nil {
		return 0, err
	}
	id, length, err := nbd.ParseOptionHeader(head)
	if err != nil {
		if status.Of(err) == status.TooBig {
			if _, werr := c.nc.Write(nbd.AppendReply(nil, id, nbd.RepErrTooBig, nil)); werr != nil {
				return 0, werr
			}
		}
		return 0, err
	}
	data := make([]byte, length)
	if _, err := io.ReadFull(c.nc, data); err != nil {
		return 0, err
	}
	reply, next := n.Option(id, data, nil)
	if next == nbd.NextTransmit {
		// Count before the client hears of it: whoever is told to go on is served.
		c.name = n.Chosen.Name
		if !c.s.opened(c) {
			return 0, errLeaving
		}
	}
	if len(reply) > 0 {
		if _, err := c.nc.Write(reply); err != nil {
			return 0, err
		}
	}
	return next, nil
}

func (c *conn) tlsRule() nbd.TLSRule {
	switch {
	case c.s.cfg.TLS == nil:
		return nbd.TLSNone
	case beyondLoopback(c.nc.LocalAddr()) && !c.s.cfg.Plain:
		return nbd.TLSRequired
	}
	return nbd.TLSOffered
}

func (c *conn) startTLS() error {
	tc := tls.Server(c.nc, c.s.cfg.TLS)
	ctx, cancel := context.WithTimeout(context.Background(), c.s.cfg.Handshake)
	defer cancel()
	if err := tc.HandshakeContext(ctx); err != nil {
		return status.Errorf(status.Permission, "TLS with %s failed: %w", c.addr, err)
	}
	c.s.mu.Lock() // Close and evict look at nc
	c.nc = tc
	c.s.mu.Unlock()
	c.who = identify(tc)
	return nil
}

// allowed says what this client may do with an export.
func (c *conn) allowed(name string) Access {
	if c.s.cfg.Allow == nil {
		return AccessFull
	}
	return c.s.cfg.Allow(c.who, name)
}

// list names the exports this client may open.
func (c *conn) list() []string {
	var out []string
	for _, name := range c.s.cfg.Exports.List() {
		if c.allowed(name) != AccessNone {
			out = append(out, name)
		}
	}
	return out
}

// lookup opens an export for the negotiation. The last one opened is the one
// that is served.
func (c *conn) lookup(name string) (nbd.Export, error) {
	if name == "" {
		name = c.s.cfg.Default
	}
	access := c.allowed(name)
	if access == AccessNone {
		return nbd.Export{}, status.Errorf(status.Permission, "export %q is not for this client: its name, as its certificate has it, is not among those the host lets open it", name)
	}
	v, err := c.s.cfg.Exports.Open(name)
	if err != nil {
		return nbd.Export{}, err
	}
	c.vol, c.access = v, access
	flags := nbd.HasFlags | nbd.SendFlush | nbd.SendFUA | nbd.CanMultiConn | nbd.SendCache
	if c.readOnly() {
		flags |= nbd.ReadOnly
	} else {
		flags |= nbd.SendTrim | nbd.SendWriteZeroes | nbd.SendFastZero
	}
	return nbd.Export{Name: name, Size: v.Size(), Flags: flags}, nil
}

func (c *conn) readOnly() bool { return c.access != AccessFull || c.vol.ReadOnly() }

// begin readies the connection for transmission.
func (c *conn) begin(n *nbd.Negotiation) error {
	if err := c.nc.SetDeadline(time.Time{}); err != nil {
		return err
	}
	c.door = nbd.Door{Size: n.Chosen.Size, ReadOnly: c.readOnly(), Structured: n.Structured, AllocID: n.AllocID}
	out, err := socket.NewOutbox(c.nc, func(error) { c.cut() })
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out, c.moved.L, c.stats = out, &c.mu, &nbd.Stats{}
	c.inFlight = map[*volume.Op]*request{}
	c.buf = make([]byte, bufferBytes)
	c.readAt = c.s.now()
	if c.leaving != staying {
		return errLeaving
	}
	return nil
}

// serve reads requests until the connection's end, then lets what is in flight
// finish and sends its answers.
func (c *conn) serve() error {
	err := c.transmit()
	c.mu.Lock()
	for len(c.inFlight) > 0 {
		c.moved.Wait()
	}
	c.mu.Unlock()
	if isPeerGone(err) {
		return err
	}
	if ferr := c.out.Finish(c.s.cfg.Unread); ferr != nil && !isPeerGone(ferr) {
		return errors.Join(err, ferr)
	}
	return err
}

// leave asks the reader to come to an end; it may be in a read.
func (c *conn) leave(how leave) {
	c.mu.Lock()
	c.leaving = max(c.leaving, how)
	c.mu.Unlock()
	c.kick()
}

// kick wakes the reader from a read.
func (c *conn) kick() {
	c.s.mu.Lock()
	nc := c.nc
	c.s.mu.Unlock()
	if err := nc.SetReadDeadline(time.Unix(1, 0)); err != nil && !isPeerGone(err) {
		c.s.log.Warn("nbd: wake a reader", "peer", c.addr, "err", err)
	}
}

// cut ends the connection at once. What is in flight still comes back from the
// volume and is released.
func (c *conn) cut() {
	c.s.mu.Lock()
	nc := c.nc
	c.s.mu.Unlock()
	c.s.closeConn(bare(nc))
}

// bare is the socket under a TLS connection: closing that one says goodbye
// first, which can take seconds.
func bare(nc net.Conn) net.Conn {
	if tc, ok := nc.(*tls.Conn); ok {
		return tc.NetConn()
	}
	return nc
}

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

func isBusy(err error) bool {
	for _, e := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func isDeadline(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
