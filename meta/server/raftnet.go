package server

import (
	"context"
	"crypto/tls"
	"net"
	"time"

	"github.com/hashicorp/raft"
)

// transport is raft's TCP transport without its heartbeat shortcut.
//
// hashicorp/raft 1.8.0 (issue 695) hands heartbeats to a handler on the
// transport's own goroutine, which raises the term under the leader's loop; a
// deposed leader can then store an entry under the new term, and two nodes
// commit different entries at one index. Without the handler heartbeats pass
// through the main loop like every other request.
type transport struct{ *raft.NetworkTransport }

var (
	_ raft.Transport   = transport{}
	_ raft.WithPreVote = transport{}
	_ raft.WithClose   = transport{}
)

// SetHeartbeatHandler does nothing, on purpose; see transport.
func (transport) SetHeartbeatHandler(func(raft.RPC)) {}

// streams carries raft over a given listener, in TLS when configured.
type streams struct {
	net.Listener
	tls *tls.Config
}

// Dial implements raft.StreamLayer.
func (s streams) Dial(addr raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	d := &net.Dialer{Timeout: timeout}
	if s.tls == nil {
		return d.Dial("tcp", string(addr))
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return (&tls.Dialer{NetDialer: d, Config: s.tls}).DialContext(ctx, "tcp", string(addr))
}
