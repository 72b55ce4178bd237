// Package server serves the stores of one chunk server over framed connections.
//
// Duty: accepting, the Hello, decoding, dispatch to stores, back-pressure, and
// replies written together. Floor: F3. It does not open stores, understand
// requests beyond their store, or dial.
//
// # Stages (the functions stand in this order, over the files)
//
//  1. Serve     accept                                              (server.go)
//  2. greet     the first frame is a Hello of our cluster           (serve.go)
//  3. serve     every buffered frame is decoded and grouped by store (serve.go)
//  4. submit    one batch for one store                             (serve.go)
//  5. Replies   from whoever answers, into the outbox               (serve.go)
package server

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/cairnstore/cairn/chunk/stream"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// Store is what the server needs of a store.
type Store interface {
	ID() ids.StoreID
	// Submit has copied every Request.Data, and does not use reqs itself any
	// more, when it returns; the requests it may keep. It answers each once, on
	// any goroutine.
	Submit(reqs []*wire.Request, sink wire.Sink)
}

// Defaults of Config.
const (
	defaultMaxConns  = 4096
	defaultHandshake = 5 * time.Second
	acceptPauseMax   = time.Second
)

// Config says what to serve.
type Config struct {
	Cluster   string // a Hello must name it
	Stores    []Store
	MaxConns  int           // connections at a time (default 4096); more are closed at once
	Handshake time.Duration // from accept to the Hello, TLS included (default 5 s)
	// WindowBytes bounds the cost (stream.Cost) of the requests one connection
	// has outstanding, and again its unwritten replies (default stream.Window).
	WindowBytes int
	Log         *slog.Logger // nil: silent
}

// Server serves stores until it is closed.
type Server struct {
	cfg    Config
	stores map[ids.StoreID]Store
	log    *slog.Logger
	start  time.Time
	wg     sync.WaitGroup // one per connection

	mu        sync.Mutex // guards the fields below
	listeners map[net.Listener]bool
	conns     map[*conn]bool
	closed    bool
}

// New returns a server that serves nothing yet.
func New(cfg Config) *Server {
	if cfg.MaxConns <= 0 {
		cfg.MaxConns = defaultMaxConns
	}
	if cfg.Handshake <= 0 {
		cfg.Handshake = defaultHandshake
	}
	if cfg.WindowBytes <= 0 {
		cfg.WindowBytes = stream.Window
	}
	s := &Server{cfg: cfg, stores: map[ids.StoreID]Store{}, log: cfg.Log, start: time.Now(), listeners: map[net.Listener]bool{}, conns: map[*conn]bool{}}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	for _, st := range cfg.Stores {
		s.stores[st.ID()] = st
	}
	return s
}

// Serve accepts connections from l, which it closes, until Close (nil) or until
// l fails for good.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return errors.Join(status.Errorf(status.Shutdown, "the chunk server is closed"), l.Close())
	}
	s.listeners[l] = true
	s.mu.Unlock()
	defer s.forget(l)
	var pause time.Duration
	for {
		nc, err := l.Accept()
		if err == nil {
			pause = 0
			s.accept(nc)
			continue
		}
		if s.isClosed() {
			return nil
		}
		var ne net.Error
		if !errors.As(err, &ne) || errors.Is(err, net.ErrClosed) {
			return status.Errorf(status.Unavailable, "the chunk server cannot accept connections on %s: %w", l.Addr(), err)
		}
		// Out of files or memory for now: connections that end give some back.
		pause = min(max(2*pause, 5*time.Millisecond), acceptPauseMax)
		s.log.Warn("cannot accept a connection; trying again", "err", err, "in", pause)
		time.Sleep(pause)
	}
}

// accept starts to serve nc, or closes it when there are too many.
func (s *Server) accept(nc net.Conn) {
	c, err := newConn(s, nc)
	if err == nil {
		err = s.add(c)
	}
	if err != nil {
		s.log.Warn("connection refused", "from", nc.RemoteAddr(), "why", errors.Join(err, nc.Close()))
		return
	}
	go func() {
		defer s.wg.Done()
		defer s.remove(c)
		c.run()
	}()
}

func (s *Server) add(c *conn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return status.Errorf(status.Shutdown, "the chunk server is closed")
	}
	if len(s.conns) >= s.cfg.MaxConns {
		return status.Errorf(status.TooBig, "%d connections are open, as many as are allowed", len(s.conns))
	}
	s.conns[c] = true
	s.wg.Add(1)
	return nil
}

func (s *Server) remove(c *conn) {
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
}

func (s *Server) forget(l net.Listener) {
	s.mu.Lock()
	delete(s.listeners, l)
	s.mu.Unlock()
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// Conns returns how many connections are open.
func (s *Server) Conns() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// Close stops listening, ends every connection and returns when their
// goroutines have ended. Stores may still answer: nobody hears it.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	var errs []error
	for l := range s.listeners {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, fmt.Errorf("close the listener on %s: %w", l.Addr(), err))
		}
	}
	clear(s.listeners)
	conns := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.fail(errClosing)
	}
	s.wg.Wait()
	return errors.Join(errs...)
}

var errClosing = status.New(status.Shutdown, "the chunk server is closing")
