package server

import (
	"net"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

func testTransport(t *testing.T) *transport {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := newTransport(newStreams(l, nil), nil, nil, func(uint64) bool { return true }, hclog.NewNullLogger())
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// A heartbeat reaches the main loop like any other request, whatever handler
// raft sets: the guard against issue 695 on real TCP.
func TestHeartbeatsTakeTheMainLoop(t *testing.T) {
	a, b := testTransport(t), testTransport(t)
	var wrapped raft.Transport = b
	wrapped.SetHeartbeatHandler(func(rpc raft.RPC) { rpc.Respond(&raft.AppendEntriesResponse{Term: 666}, nil) })
	go func() {
		rpc := <-b.Consumer()
		rpc.Respond(&raft.AppendEntriesResponse{Term: 7}, nil)
	}()
	beat := &raft.AppendEntriesRequest{RPCHeader: raft.RPCHeader{Addr: []byte(a.LocalAddr())}, Term: 7}
	resp := &raft.AppendEntriesResponse{}
	if err := a.AppendEntries("b", b.LocalAddr(), beat, resp); err != nil {
		t.Fatal(err)
	}
	if resp.Term != 7 {
		t.Fatalf("the heartbeat was answered off the main loop (term %d)", resp.Term)
	}
}

// After a failure entries wait for a heartbeat that gets through, and then go
// at once; and for nothing when the node does not lead any more.
func TestEntriesFollowTheHeartbeat(t *testing.T) {
	a := testTransport(t)
	l := listen(t, "127.0.0.1:0")
	addr := raft.ServerAddress(l.Addr().String())
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	var leads atomic.Bool
	a.leads = func(uint64) bool { return leads.Load() }
	head := raft.RPCHeader{Addr: []byte(a.LocalAddr())}
	entries := &raft.AppendEntriesRequest{RPCHeader: head, Term: 3, PrevLogEntry: 4, PrevLogTerm: 3, LeaderCommitIndex: 4}
	send := func() error { return a.AppendEntries("b", addr, entries, &raft.AppendEntriesResponse{}) }
	for range 3 { // not leading: it fails without waiting
		if err := send(); err == nil {
			t.Fatal("entries got through to nobody")
		}
	}
	leads.Store(true)
	sent := make(chan error, 1)
	go func() { sent <- send() }()
	b := newTransport(newStreams(listen(t, string(addr)), nil), nil, nil, nil, hclog.NewNullLogger())
	defer func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}()
	var order []bool // whether what came was a heartbeat
	go func() {
		if err := a.AppendEntries("b", addr, &raft.AppendEntriesRequest{RPCHeader: head, Term: 3}, &raft.AppendEntriesResponse{}); err != nil {
			t.Error(err)
		}
	}()
	for range 2 {
		rpc := <-b.Consumer()
		order = append(order, rpc.Command.(*raft.AppendEntriesRequest).LeaderCommitIndex == 0)
		rpc.Respond(&raft.AppendEntriesResponse{Term: 3, Success: true}, nil)
	}
	if err := <-sent; err != nil || !order[0] || order[1] {
		t.Fatalf("heartbeats: %v, entries: %v", order, err)
	}
}
