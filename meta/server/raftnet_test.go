package server

import (
	"net"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

func newTransport(t *testing.T) transport {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := raft.NewNetworkTransportWithLogger(streams{Listener: l}, 2, 2*time.Second, hclog.NewNullLogger())
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return transport{n}
}

// A heartbeat reaches the main loop like any other request, whatever handler
// raft sets: the guard against issue 695 on real TCP.
func TestHeartbeatsTakeTheMainLoop(t *testing.T) {
	a, b := newTransport(t), newTransport(t)
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
