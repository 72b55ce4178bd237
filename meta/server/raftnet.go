package server

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/cairnstore/cairn/netplane/link"
)

// raftTimeout bounds one message to a peer; a snapshot gets more by its size.
const raftTimeout = 5 * time.Second

// transport is raft's TCP transport without its heartbeat shortcut, and with a
// say in elections.
//
// hashicorp/raft 1.8.0 (issue 695) hands heartbeats to a handler on the
// transport's own goroutine, which raises the term under the leader's loop; a
// deposed leader can then store an entry under the new term, and two nodes
// commit different entries at one index. Without the handler heartbeats pass
// through the main loop like every other request.
type transport struct {
	*raft.NetworkTransport
	streams *streams
	vote    *voter // nil: this node votes like any other
	leads   func(term uint64) bool
	reach   reach

	out  chan raft.RPC // with vote: what is left after it
	stop chan struct{}
	once sync.Once
	wg   sync.WaitGroup
}

var (
	_ raft.Transport   = (*transport)(nil)
	_ raft.WithPreVote = (*transport)(nil)
	_ raft.WithClose   = (*transport)(nil)
)

func newTransport(s *streams, peers raft.ServerAddressProvider, vote *voter, leads func(term uint64) bool, log hclog.Logger) *transport {
	t := &transport{streams: s, vote: vote, leads: leads, out: make(chan raft.RPC), stop: make(chan struct{})}
	t.NetworkTransport = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: s, MaxPool: 3, Timeout: raftTimeout, ServerAddressProvider: peers, Logger: log})
	if vote != nil {
		t.wg.Add(1)
		go t.filter()
	}
	return t
}

// SetHeartbeatHandler does nothing, on purpose; see transport.
func (*transport) SetHeartbeatHandler(func(raft.RPC)) {}

// Consumer implements raft.Transport.
func (t *transport) Consumer() <-chan raft.RPC {
	if t.vote == nil {
		return t.NetworkTransport.Consumer()
	}
	return t.out
}

// filter answers the requests for votes this node may not give, and passes on
// everything else in order.
func (t *transport) filter() {
	defer t.wg.Done()
	for {
		select {
		case <-t.stop:
			return
		case rpc := <-t.NetworkTransport.Consumer():
			if t.refuse(rpc) {
				t.vote.refusals.Add(1)
				continue
			}
			select {
			case t.out <- rpc:
			case <-t.stop:
				return
			}
		}
	}
}

func (t *transport) refuse(rpc raft.RPC) bool {
	switch req := rpc.Command.(type) {
	case *raft.RequestVoteRequest:
		if term, may := t.vote.may(req.Term); !may {
			rpc.Respond(&raft.RequestVoteResponse{RPCHeader: t.vote.header, Term: term}, nil)
			return true
		}
	case *raft.RequestPreVoteRequest:
		if term, may := t.vote.may(req.Term); !may {
			rpc.Respond(&raft.RequestPreVoteResponse{RPCHeader: t.vote.header, Term: term}, nil)
			return true
		}
	}
	return false
}

// RequestVote implements raft.Transport.
func (t *transport) RequestVote(id raft.ServerID, target raft.ServerAddress, req *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	if t.vote != nil {
		if term, may := t.vote.may(req.Term); !may {
			*resp = raft.RequestVoteResponse{RPCHeader: t.vote.header, Term: term}
			return nil
		}
	}
	return t.NetworkTransport.RequestVote(id, target, req, resp)
}

// RequestPreVote implements raft.WithPreVote.
func (t *transport) RequestPreVote(id raft.ServerID, target raft.ServerAddress, req *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	if t.vote != nil {
		if term, may := t.vote.may(req.Term); !may {
			*resp = raft.RequestPreVoteResponse{RPCHeader: t.vote.header, Term: term}
			return nil
		}
	}
	return t.NetworkTransport.RequestPreVote(id, target, req, resp)
}

// Close implements raft.WithClose: no connection is left, in or out.
func (t *transport) Close() (err error) {
	t.once.Do(func() {
		close(t.stop)
		err = t.NetworkTransport.Close()
		t.CloseStreams()
		err = errors.Join(err, t.streams.hangUp())
		t.wg.Wait()
	})
	return err
}

// streams carries raft over a given listener, in TLS when configured. It
// remembers accepted connections: raft's transport leaves them to their peers
// when it is closed.
type streams struct {
	net.Listener
	tls *tls.Config

	mu     sync.Mutex // guards both below
	conns  map[net.Conn]struct{}
	closed bool
}

func newStreams(l net.Listener, conf *tls.Config) *streams {
	if conf != nil {
		l = tls.NewListener(l, conf)
	}
	return &streams{Listener: l, tls: conf, conns: map[net.Conn]struct{}{}}
}

// Accept implements net.Listener.
func (s *streams) Accept() (net.Conn, error) {
	c, err := s.Listener.Accept()
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errors.Join(net.ErrClosed, c.Close())
	}
	s.conns[c] = struct{}{}
	return accepted{c, s}, nil
}

// accepted is a connection that takes itself off the list.
type accepted struct {
	net.Conn
	s *streams
}

// Close implements net.Conn.
func (c accepted) Close() error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	delete(c.s.conns, c.Conn)
	return c.Conn.Close()
}

// hangUp ends every accepted connection, and those to come.
func (s *streams) hangUp() (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for c := range s.conns {
		if e := c.Close(); e != nil && !errors.Is(e, net.ErrClosed) {
			err = errors.Join(err, e)
		}
	}
	clear(s.conns)
	return err
}

// Dial implements raft.StreamLayer.
func (s *streams) Dial(addr raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	return link.Dialer{TLS: s.tls, Timeout: timeout}.Dial(context.Background(), string(addr))
}
