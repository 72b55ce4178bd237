package store

import (
	"testing"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// lastReply is a connection that keeps the last answer.
type lastReply struct{ r *wire.Reply }

func (l *lastReply) Replies(rs []*wire.Reply) { l.r = rs[len(rs)-1] }

// Once a newer connection has sealed a volume, nothing that comes late over an
// older one takes effect, in the same epoch too: the writer has given it up.
func TestAnOlderConnectionIsRefused(t *testing.T) {
	s := open(t, formatMem(t), "boot")
	older, newer := &lastReply{}, &lastReply{}
	ask := func(c *lastReply, q *wire.Request) status.Kind {
		q.Store, q.Volume, q.Epoch = s.ID(), 7, 3
		s.Submit([]*wire.Request{q}, c)
		return c.r.Status
	}
	zero := func() *wire.Request {
		return &wire.Request{Kind: wire.Zero, Chunk: 1, Block: 5, Count: 1, Version: ids.MakeVersion(3, 9)}
	}
	for i, c := range []*lastReply{older, newer} {
		if k := ask(c, &wire.Request{Kind: wire.Seal, Count: uint32(i + 1)}); k != status.OK {
			t.Fatalf("seal: %v", k)
		}
		if k := ask(c, zero()); k != status.OK {
			t.Fatalf("the connection that has sealed is refused: %v", k)
		}
	}
	late := []*wire.Request{zero(), {Kind: wire.Flush, Floor: ids.MakeVersion(3, 9)}, {Kind: wire.Settle, Floor: ids.MakeVersion(3, 9)},
		{Kind: wire.Install, Chunk: 1, Limit: ids.MakeVersion(3, 0), Entries: []wire.Entry{{Chunk: 1, Block: 5, Kind: wire.EntryHole}}},
		{Kind: wire.Read, Chunk: 1, Block: 5, Count: 1}, {Kind: wire.Seal, Count: 1}}
	for _, q := range late {
		if k := ask(older, q); k != status.Unavailable {
			t.Errorf("a late %s over the older connection: %v", q.Kind, k)
		}
	}
	if k := ask(newer, zero()); k != status.OK {
		t.Errorf("the newer connection: %v", k)
	}
}
