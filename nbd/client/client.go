// Package client is a pipelined NBD client: for cairn's own commands, for
// benchmarks and for tests that keep a history of what they did.
//
// Duty: URIs, the client's side of the handshake, many requests in flight,
// answered in any order; a Client for as long as its connection lasts, a
// Patient that dials again. Floor: F3.
package client

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/socket"
	"github.com/cairnstore/cairn/proto/status"
)

// Req is one request. It, and Data, belong to the client from Start until
// Done is called.
type Req struct {
	Type  uint16 // nbd.CmdRead, ...
	Flags uint16 // nbd.CmdFUA, ...
	Off   uint64
	Len   uint32 // bytes; of a read or write, len(Data) counts instead
	Data  []byte // of a write: the payload; of a read: where it goes

	// Done is called once, from a goroutine of the client, and must not block;
	// it may Start more.
	Done func(*Req)

	Err     error        // afterwards; its kind is status.Unknown when a change was sent and never answered
	Extents []nbd.Extent // afterwards, of a BlockStatus: at least one
	User    any          // the caller's

	open atomic.Int32 // what is outstanding: the reply, and the sender's use of Data
	c    *Client      // whose it is, or was
	got  uint64       // bytes of a read that have come
	head [nbd.RequestSize]byte
}

// Client is one connection to one export. All methods may be called from many
// goroutines.
type Client struct {
	calls
	nc     net.Conn
	br     *bufio.Reader
	out    *socket.Outbox
	export nbd.Export

	structured bool
	describes  bool   // base:allocation was selected
	allocID    uint32 // its id, any number

	mu      sync.Mutex // guards what follows
	pending map[uint64]*Req
	cookie  uint64
	left    bool  // a disconnect was sent
	leaving error // the server is shutting down: nothing is sent any more, and it is left once pending is empty
	err     error // the connection is over

	closing sync.Once
	closed  error         // what closing said
	done    chan struct{} // closed when the reader has ended
}

// Info returns what the server said of the export.
func (c *Client) Info() nbd.Export { return c.export }

// Size returns the export's size in bytes at the time of the connection.
func (c *Client) Size() uint64 { return c.export.Size }

// Structured says whether structured replies were negotiated.
func (c *Client) Structured() bool { return c.structured }

// HasBlockStatus says whether the server describes allocation.
func (c *Client) HasBlockStatus() bool { return c.describes }

// MaxBytes is how much data one request may carry.
func (c *Client) MaxBytes() uint32 {
	if m := c.export.MaxBlock; m != 0 && m < nbd.MaxPayload {
		return m
	}
	return nbd.MaxPayload
}

// Done is closed when the connection is over.
func (c *Client) Done() <-chan struct{} { return c.done }

// Start sends a request without waiting. How many are in flight is the
// caller's to bound.
func (c *Client) Start(r *Req) {
	r.c, r.Err, r.Extents, r.got = c, nil, nil, 0
	if r.Type == nbd.CmdRead || r.Type == nbd.CmdWrite {
		r.Len = uint32(min(uint64(len(r.Data)), 1<<32-1))
	}
	if err := c.check(r); err != nil {
		r.Err = err
		r.Done(r)
		return
	}
	r.open.Store(2)
	c.out.Lock()
	c.mu.Lock()
	if over := cmp.Or(c.err, c.leaving); over != nil {
		r.Err = status.Errorf(status.Unavailable, "not sent: %w", over)
		c.mu.Unlock()
		c.out.Unlock()
		r.Done(r)
		return
	}
	c.cookie++
	c.pending[c.cookie] = r
	nbd.AppendRequest(r.head[:0], nbd.Request{Flags: r.Flags, Type: r.Type, Cookie: c.cookie, Off: r.Off, Len: r.Len})
	c.mu.Unlock()
	var data []byte
	if r.Type == nbd.CmdWrite {
		data = r.Data
	}
	c.out.Add(r.head[:], data, r)
	c.out.Unlock()
}

// check refuses what the server would have to hang up for.
func (c *Client) check(r *Req) error {
	switch {
	case (r.Type == nbd.CmdRead || r.Type == nbd.CmdWrite) && uint64(len(r.Data)) > uint64(c.MaxBytes()):
		return status.Errorf(status.TooBig, "a request of %d bytes is over the server's limit of %d", len(r.Data), c.MaxBytes())
	case r.Type == nbd.CmdBlockStatus && !c.describes:
		return status.Errorf(status.Unsupported, "the server does not describe allocation")
	case r.Type == nbd.CmdDisc:
		return status.Errorf(status.Invalid, "a disconnect is no request: use Close")
	}
	return nil
}

var _ socket.Owner = (*Req)(nil)

// Sent notes that Data is in the kernel, or that the connection failed.
func (r *Req) Sent() { r.settled() }

// settled finishes the request when neither the reply nor the sender is
// outstanding.
func (r *Req) settled() {
	if r.open.Add(-1) == 0 {
		r.Done(r)
	}
}

// start makes the connection ready for requests.
func (c *Client) start() error {
	out, err := socket.NewOutbox(c.nc, c.fail)
	if err != nil {
		return err
	}
	c.calls = calls{c}
	c.out, c.pending, c.done = out, map[uint64]*Req{}, make(chan struct{})
	go c.read()
	return nil
}

// read takes replies until the connection is over, then fails what is left.
func (c *Client) read() {
	defer close(c.done)
	var err error
	for err == nil {
		err = c.reply()
	}
	c.fail(err)
	c.mu.Lock()
	left := c.pending
	c.pending = nil
	err = c.err
	c.mu.Unlock()
	for _, r := range left {
		kind := status.Unknown
		if r.Type == nbd.CmdRead || r.Type == nbd.CmdBlockStatus || r.Type == nbd.CmdCache {
			kind = status.Unavailable
		}
		r.Err = status.Errorf(kind, "the request was sent and not answered: %w", err)
		r.settled()
	}
}

// fail ends the connection; the first reason counts.
func (c *Client) fail(err error) {
	c.mu.Lock()
	if c.err == nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = status.Errorf(status.Unavailable, "the NBD server closed the connection")
		}
		c.err = err
	}
	c.mu.Unlock()
	if err := c.hangUp(); err != nil {
		c.mu.Lock()
		c.err = errors.Join(c.err, err)
		c.mu.Unlock()
	}
}

// hangUp closes the connection, and says the same however often it is asked.
func (c *Client) hangUp() error {
	c.closing.Do(func() { c.closed = c.nc.Close() })
	return c.closed
}

// reply reads one simple reply or one chunk.
func (c *Client) reply() error {
	magic, err := c.br.Peek(4)
	if err != nil {
		return err
	}
	n, err := nbd.ReplyHead(magic)
	if err != nil {
		return err
	}
	var head [nbd.StructuredSize]byte
	if _, err := io.ReadFull(c.br, head[:n]); err != nil {
		return err
	}
	ch, err := nbd.ParseChunk(head[:n])
	if err != nil {
		return err
	}
	c.mu.Lock()
	r := c.pending[ch.Cookie]
	if ch.Done {
		delete(c.pending, ch.Cookie)
	}
	c.mu.Unlock()
	if r == nil {
		return status.Errorf(status.Invalid, "the server answered request %d, which is not outstanding", ch.Cookie)
	}
	err = c.chunk(r, ch)
	if err != nil && ch.Done { // it is no longer pending, and must not be forgotten
		c.mu.Lock()
		c.pending[ch.Cookie] = r
		c.mu.Unlock()
	}
	if err != nil || !ch.Done {
		return err
	}
	if r.Err == nil {
		r.Err = c.complete(r)
	}
	c.leave(r)
	r.settled()
	return nil
}

// leave says goodbye to a server that has answered "shutting down", once
// nothing is outstanding.
func (c *Client) leave(r *Req) {
	c.mu.Lock()
	if c.leaving == nil && errors.Is(r.Err, status.Shutdown) {
		c.leaving = status.Errorf(status.Unavailable, "the NBD server is shutting down")
	}
	now := c.leaving != nil && len(c.pending) == 0 && !c.left
	c.left = c.left || now
	c.mu.Unlock()
	if now {
		c.goodbye()
	}
}

// goodbye sends a disconnect; the server then closes the connection.
func (c *Client) goodbye() {
	head := nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdDisc})
	c.out.Lock()
	c.out.Add(head, nil, nil)
	c.out.Unlock()
}

// complete checks that a reply without an error was all there.
func (c *Client) complete(r *Req) error {
	switch {
	case r.Type == nbd.CmdRead && r.got != uint64(len(r.Data)):
		return status.Errorf(status.IO, "the server sent %d of %d bytes", r.got, len(r.Data))
	case r.Type == nbd.CmdBlockStatus && len(r.Extents) == 0:
		return status.Errorf(status.IO, "the server described no extent")
	}
	return nil
}

// chunk takes what belongs to one header. Errors are the connection's; those
// of the request go into it.
func (c *Client) chunk(r *Req, ch nbd.Chunk) error {
	if !ch.Structured {
		if c.structured && (r.Type == nbd.CmdRead || r.Type == nbd.CmdBlockStatus) {
			return status.Errorf(status.Invalid, "the server gave a simple reply where a structured one was agreed")
		}
		if ch.Errno != 0 {
			r.fail(ch.Errno, "")
			return nil
		}
		if r.Type == nbd.CmdRead {
			r.got = uint64(len(r.Data))
			_, err := io.ReadFull(c.br, r.Data)
			return err
		}
		return nil
	}
	if !c.structured {
		return status.Errorf(status.Invalid, "the server gave a structured reply, which was not agreed")
	}
	if ch.Type == nbd.TypeOffsetData {
		return c.data(r, ch.Len)
	}
	payload := make([]byte, ch.Len) // bounded by ParseChunk
	if _, err := io.ReadFull(c.br, payload); err != nil {
		return err
	}
	switch {
	case ch.IsError():
		errno, text, err := nbd.ParseError(payload)
		if err != nil {
			return err
		}
		r.fail(errno, text)
	case ch.Type == nbd.TypeOffsetHole:
		off, n, err := nbd.ParseHole(payload)
		if err != nil {
			return err
		}
		part, err := r.part(off, n)
		if err != nil {
			return err
		}
		clear(part)
	case ch.Type == nbd.TypeBlockStatus:
		id, xs, err := nbd.ParseExtents(payload)
		if err != nil {
			return err
		}
		if id == c.allocID {
			r.Extents = xs
		}
	case ch.Type != nbd.TypeNone:
		return status.Errorf(status.Unsupported, "the server sent a chunk of unknown type %d", ch.Type)
	}
	return nil
}

// data takes a data chunk of n bytes, offset included.
func (c *Client) data(r *Req, n uint32) error {
	var off [8]byte
	if n < 8 {
		return status.Errorf(status.Invalid, "the server sent a data chunk of %d bytes, which has no offset", n)
	}
	if _, err := io.ReadFull(c.br, off[:]); err != nil {
		return err
	}
	part, err := r.part(nbd.ParseOffset(off[:]), n-8)
	if err != nil {
		return err
	}
	_, err = io.ReadFull(c.br, part)
	return err
}

// part is the piece of a read's buffer for n bytes at off of the export.
func (r *Req) part(off uint64, n uint32) ([]byte, error) {
	if r.Type != nbd.CmdRead || off < r.Off || off-r.Off > uint64(len(r.Data)) || uint64(n) > uint64(len(r.Data))-(off-r.Off) || n == 0 {
		return nil, status.Errorf(status.Invalid, "the server sent %d bytes at %d, which were not asked for", n, off)
	}
	r.got += uint64(n)
	return r.Data[off-r.Off:][:n], nil
}

// fail enters the server's error into the request; the first one counts.
func (r *Req) fail(errno uint32, text string) {
	if r.Err != nil {
		return
	}
	kind := nbd.KindOf(errno)
	if text == "" {
		text = kind.String()
	}
	r.Err = status.Errorf(kind, "the NBD server answered %s of %d bytes at %d with error %d: %s", name(r.Type), r.Len, r.Off, errno, text)
}

func name(cmd uint16) string {
	names := [...]string{"read", "write", "disconnect", "flush", "trim", "cache", "write-zeroes", "block-status"}
	if int(cmd) < len(names) {
		return names[cmd]
	}
	return fmt.Sprintf("command %d", cmd)
}

// Close says goodbye and waits until the connection is over; requests in
// flight are answered first if the server does so within 10 s.
func (c *Client) Close() error {
	c.mu.Lock()
	first := !c.left
	c.left = true
	c.mu.Unlock()
	if first {
		c.goodbye()
	}
	t := time.NewTimer(10 * time.Second)
	defer t.Stop()
	select {
	case <-c.done:
	case <-t.C:
	}
	err := c.hangUp()
	<-c.done
	return err
}

// Dial connects to an export by its URI and shakes hands. tlsConf may be nil;
// if it is not, or the scheme is nbds, TLS is demanded.
func Dial(ctx context.Context, uri string, tlsConf *tls.Config) (*Client, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	return dial(ctx, u, tlsConf, (*handshake).open)
}

// Handover opens an export with simple replies and gives the connection away,
// with nothing of the server's read beyond the handshake: for a kernel, which
// speaks the rest itself and knows no TLS.
func Handover(ctx context.Context, uri string) (net.Conn, nbd.Export, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, nbd.Export{}, err
	}
	if u.TLS {
		return nil, nbd.Export{}, status.Errorf(status.Unsupported, "%s demands TLS, which the kernel's NBD client does not speak: use a unix socket, or an address on loopback", uri)
	}
	var nc net.Conn
	var x nbd.Export
	_, err = dial(ctx, u, nil, func(h *handshake) error {
		if err := h.plain(); err != nil {
			return err
		}
		nc, x, h.kept = h.nc, h.c.export, true
		return nil
	})
	return nc, x, err
}

// List returns the names of the exports of the server that uri names.
func List(ctx context.Context, uri string, tlsConf *tls.Config) ([]string, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	var names []string
	_, err = dial(ctx, u, tlsConf, func(h *handshake) error {
		names, err = h.list()
		return err
	})
	return names, err
}

// Info describes the export that uri names without opening it.
func Info(ctx context.Context, uri string, tlsConf *tls.Config) (nbd.Export, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nbd.Export{}, err
	}
	var x nbd.Export
	_, err = dial(ctx, u, tlsConf, func(h *handshake) error {
		x, err = h.info()
		return err
	})
	return x, err
}
