package server

import (
	"net"
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
	n := newTransport(newStreams(l, nil), nil, nil, hclog.NewNullLogger())
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
