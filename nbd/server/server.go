// Package server serves volumes to NBD clients over unix and TCP sockets.
//
// Duty: connections and their limits, the handshake's I/O, the transmission
// engine (transmit.go), draining. Floor: F3. It keeps no data and decides
// nothing about it: a Volume does, usually chunk/gateway's.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/proto/status"
)

// Volume is what an export serves. Its methods are called from many
// goroutines.
type Volume interface {
	Size() uint64
	ReadOnly() bool
	// Submit takes a batch of operations, valid and inside Size. Each comes back
	// once through op.User.(volume.Completer), from any goroutine, perhaps
	// before Submit returns; until then it, its Data and States belong to the
	// volume.
	// The slice is the caller's again when Submit returns.
	Submit(ops []*volume.Op)
	// Extents describes [off, off+n) from off on, coarsely: never a hole where a
	// write may have been acknowledged. How single blocks are stored, a read with
	// States tells.
	Extents(off, n uint64) []volume.Extent
}

// Exports finds volumes by name. The error kinds of Open reach the client:
// NotFound, Permission, Shutdown and so on.
type Exports interface {
	List() []string
	Open(name string) (Volume, error)
}

// Config says what to serve and how much a client may take.
type Config struct {
	Exports Exports
	TLS     *tls.Config // nil: no TLS. Else offered, and required on TCP beyond loopback
	Plain   bool        // allow TCP beyond loopback without TLS: a network trusted as a whole
	Default string      // the export that the empty name means; "": the empty name is looked up as it is
	// Allow says what a client may do with an export; nil: everything. It is
	// asked before Exports.Open, so that a client learns nothing of what is not
	// for it, not even whether it is there.
	Allow    func(who Identity, export string) Access
	MaxConns int          // connections at once (default 1024)
	Log      *slog.Logger // nil: silent

	MaxRequests int           // of one connection, read and not yet answered into the kernel (default 1024)
	MaxBytes    int           // of their data (default 64 MiB, least nbd.MaxPayload)
	Handshake   time.Duration // whole handshake (default 10 s)
	// Unread is how long sent requests may lie unread before the connection is
	// closed and they are discarded (default 4 s, a third of the 12 s after which
	// a kernel attached by nbd/kernel sends a request again on another connection;
	// others wait longer): a write that a client has given up and replayed must
	// not land on newer data.
	Unread time.Duration
}

// Server serves NBD on any number of listeners.
type Server struct {
	cfg   Config
	log   *slog.Logger
	start time.Time

	beat    atomic.Int64  // ns since start when the process was last seen running
	freezes atomic.Uint64 // times it was found to have stood still for longer than Unread
	stop    chan struct{}

	mu        sync.Mutex // guards what follows
	listeners map[net.Listener]struct{}
	conns     map[*conn]struct{}    // len ≤ cfg.MaxConns
	accepted  uint64                // connections so far: the order of their age
	past      map[string]*nbd.Stats // by export: of connections that have ended
	closed    bool
	wg        sync.WaitGroup // connections and the heartbeat
}

// ErrClosed is what Serve returns after Close.
var ErrClosed = status.New(status.Shutdown, "the NBD server is closed")

// New returns a server. It must be closed.
func New(cfg Config) *Server {
	setDefault(&cfg.MaxConns, 1024)
	setDefault(&cfg.MaxRequests, 1024)
	setDefault(&cfg.MaxBytes, 64<<20)
	setDefault(&cfg.Handshake, 10*time.Second)
	setDefault(&cfg.Unread, 4*time.Second)
	cfg.MaxBytes = max(cfg.MaxBytes, nbd.MaxPayload)
	if cfg.TLS != nil && cfg.TLS.MinVersion < tls.VersionTLS12 {
		cfg.TLS = cfg.TLS.Clone()
		cfg.TLS.MinVersion = tls.VersionTLS12
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, log: cfg.Log, start: time.Now(), stop: make(chan struct{}),
		listeners: map[net.Listener]struct{}{}, conns: map[*conn]struct{}{}, past: map[string]*nbd.Stats{}}
	s.wg.Add(1)
	go s.heart()
	return s
}

func setDefault[T int | time.Duration](v *T, d T) {
	if *v <= 0 {
		*v = d
	}
}

// Serve accepts connections until l fails or the server is closed, and closes
// l. It returns ErrClosed after Close.
func (s *Server) Serve(l net.Listener) error {
	if err := s.admit(l); err != nil {
		if cerr := l.Close(); cerr != nil {
			return errors.Join(err, cerr)
		}
		return err
	}
	defer s.forget(l)
	pause := time.Duration(0)
	for {
		nc, err := l.Accept()
		if err == nil {
			pause = 0
			s.accept(nc)
			continue
		}
		if s.isClosed() {
			return ErrClosed
		}
		if ne, ok := err.(net.Error); !ok || !ne.Timeout() && !isBusy(err) {
			return status.Errorf(status.Unavailable, "the NBD listener on %s failed: %w", l.Addr(), err)
		}
		// No file descriptors left, or the like: the connection waits in the backlog.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		s.log.Warn("nbd: cannot accept now", "err", err, "again_in", pause)
		select {
		case <-time.After(pause):
		case <-s.stop:
			return ErrClosed
		}
	}
}

// admit takes a listener in, unless it would serve a network in clear.
func (s *Server) admit(l net.Listener) error {
	if beyondLoopback(l.Addr()) && s.cfg.TLS == nil && !s.cfg.Plain {
		return status.Errorf(status.Permission, "NBD on %s would be readable by the network: give a TLS certificate, listen on loopback or a unix socket, or declare the network trusted", l.Addr())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	s.listeners[l] = struct{}{}
	return nil
}

func (s *Server) forget(l net.Listener) {
	s.mu.Lock()
	delete(s.listeners, l)
	s.mu.Unlock()
	if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		s.log.Warn("nbd: close a listener", "err", err)
	}
}

func beyondLoopback(a net.Addr) bool {
	t, ok := a.(*net.TCPAddr)
	return ok && !t.IP.IsLoopback()
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// accept starts a connection. When the house is full the oldest one that has
// not finished its handshake makes room: half-open connections cannot lock
// clients out.
func (s *Server) accept(nc net.Conn) {
	c := &conn{s: s, nc: nc, addr: nc.RemoteAddr().String(), freezes: s.freezes.Load()}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || (len(s.conns) >= s.cfg.MaxConns && !s.evict()) {
		s.log.Warn("nbd: connection refused, too many are open", "peer", c.addr, "limit", s.cfg.MaxConns)
		s.closeConn(nc)
		return
	}
	s.accepted++
	c.age = s.accepted
	s.conns[c] = struct{}{}
	s.wg.Add(1)
	go c.run()
}

// evict closes the oldest half-open connection; s.mu is held.
func (s *Server) evict() bool {
	var oldest *conn
	for c := range s.conns {
		if !c.open && (oldest == nil || c.age < oldest.age) {
			oldest = c
		}
	}
	if oldest == nil {
		return false
	}
	delete(s.conns, oldest)
	s.closeConn(bare(oldest.nc))
	return true
}

func (s *Server) closeConn(nc net.Conn) {
	if err := nc.Close(); err != nil && !errors.Is(err, net.ErrClosed) && !isPeerGone(err) {
		s.log.Warn("nbd: close a connection", "err", err)
	}
}

// opened moves a connection from handshake to transmission; false: the server
// is closing, or it was evicted meanwhile.
func (s *Server) opened(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.conns[c]; !ok || s.closed {
		return false
	}
	c.open = true
	return true
}

func (s *Server) ended(c *conn) {
	s.closeConn(c.nc)
	s.mu.Lock()
	delete(s.conns, c)
	if c.open {
		s.remember(c)
	}
	s.mu.Unlock()
	s.wg.Done()
}

// Conns returns how many connections an export has in transmission.
func (s *Server) Conns(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for c := range s.conns {
		if c.open && c.name == name {
			n++
		}
	}
	return n
}

// remember keeps the counts of a connection that has ended; s.mu is held.
func (s *Server) remember(c *conn) {
	p := s.past[c.name]
	if p == nil {
		p = &nbd.Stats{}
		s.past[c.name] = p
	}
	c.mu.Lock()
	p.Merge(c.stats)
	c.mu.Unlock()
}

// ExportStats is what an export does and has done.
type ExportStats struct {
	Connections   int
	InFlight      int           // requests read and not yet answered into the kernel
	InFlightBytes int           // of their data
	nbd.Stats                   // since the export was first opened here, or last dropped
	ErrorAgo      time.Duration // of the last of Errors
}

// Stats returns the statistics of an export; zero of one nobody has opened.
func (s *Server) Stats(name string) ExportStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	var x ExportStats
	if p := s.past[name]; p != nil {
		x.Merge(p)
	}
	for c := range s.conns {
		if !c.open || c.name != name {
			continue
		}
		x.Connections++
		c.mu.Lock()
		x.InFlight += c.requests
		x.InFlightBytes += c.bytes
		x.Merge(c.stats)
		c.mu.Unlock()
	}
	x.ErrorAgo = s.now() - x.ErrorAt
	return x
}

// Drop ends the connections of an export that leaves this server. What is in
// flight finishes and is answered; requests read later are answered with
// ESHUTDOWN; then the connections close, at the latest after Config.Unread.
// Drop does not wait. New connections are up to Exports.Open.
func (s *Server) Drop(name string) {
	s.mu.Lock()
	delete(s.past, name)
	s.mu.Unlock()
	for _, c := range s.pick(func(c *conn) bool { return c.open && c.name == name }) {
		c.leave(leaveRefusing)
		time.AfterFunc(s.cfg.Unread, c.cut)
	}
}

// Close stops listening and drains: what is in flight finishes and is
// answered; what was not yet read stays unread, so that a client which
// reconnects sends it again, to the next server, without an error. It returns
// when all connections are gone; when ctx ends first, it cuts them and returns
// an error.
func (s *Server) Close(ctx context.Context) error {
	s.mu.Lock()
	first := !s.closed
	s.closed = true
	var errs []error
	for l := range s.listeners {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	s.mu.Unlock()
	if first {
		close(s.stop)
	}
	for _, c := range s.pick(func(*conn) bool { return true }) {
		c.leave(leaveSilently)
	}
	done := make(chan struct{})
	go func() { s.wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
		left := s.pick(func(*conn) bool { return true })
		for _, c := range left {
			c.cut()
		}
		errs = append(errs, status.Errorf(status.Timeout, "%d NBD connections still had requests in flight and were cut: %w", len(left), ctx.Err()))
	}
	return errors.Join(errs...)
}

func (s *Server) pick(want func(*conn) bool) []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*conn
	for c := range s.conns {
		if want(c) {
			out = append(out, c)
		}
	}
	return out
}

// heart notices when the whole process stood still (SIGSTOP, a suspended
// machine): what lies in the sockets then is as old as that.
func (s *Server) heart() {
	defer s.wg.Done()
	t := time.NewTicker(max(s.cfg.Unread/10, time.Millisecond))
	defer t.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-t.C:
			s.pulse(s.now())
		}
	}
}

func (s *Server) now() time.Duration { return time.Since(s.start) }

func (s *Server) pulse(now time.Duration) {
	if now-time.Duration(s.beat.Load()) > s.cfg.Unread {
		s.freezes.Add(1)
		s.log.Warn("nbd: the process stood still; clients must reconnect", "for", now-time.Duration(s.beat.Load()))
	}
	s.beat.Store(int64(now))
}

// frozeSince says whether the process stood still since freezes was read.
func (s *Server) frozeSince(freezes uint64, now time.Duration) bool {
	return s.freezes.Load() != freezes || now-time.Duration(s.beat.Load()) > s.cfg.Unread
}

func isPeerGone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) || isReset(err)
}
