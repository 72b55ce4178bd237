package state

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/pb"
)

// The same commands, done by programs that word their answers and events
// otherwise: the states differ, and what is compared of them does not. Any other
// difference shows.
func TestWordsAreNotCompared(t *testing.T) {
	c := fourHosts(t)
	c.do(&pb.Command{Op: &pb.Command_DeleteVolume{DeleteVolume: &pb.DeleteVolume{Volume: "none"}}})
	c.ok(&pb.Command{Op: &pb.Command_ChangeMembers{ChangeMembers: &pb.ChangeMembers{Changes: []*pb.MemberChange{{VolumeId: 1 << 40}}}}})
	compared := func(kv KV) uint64 {
		var words uint64
		kv.Scan(nil, nil, func(k, v []byte) bool { words += HashWords(k, v); return true })
		return HashAll(kv) - words
	}
	other := c.kv.Clone()
	details, parts, events := 0, 0, 0
	c.kv.Scan(nil, nil, func(k, v []byte) bool {
		switch k[0] {
		case tReply:
			r := &pb.Result{}
			decode(v, r)
			if r.Detail != "" {
				r.Detail = "in other words"
				details++
			}
			for _, m := range r.Members {
				if m.Detail != "" {
					m.Detail = "in other words"
					parts++
				}
			}
			other.Set(k, encode(r))
		case tEvent:
			e := &pb.Event{}
			decode(v, e)
			e.What = "something"
			if e.Outcome != "" {
				e.Outcome = "in other words"
				events++
			}
			other.Set(k, encode(e))
		}
		return true
	})
	if details == 0 || parts == 0 || events == 0 {
		t.Fatalf("%d answers, %d parts of answers and %d events with words", details, parts, events)
	}
	if HashAll(c.kv) == HashAll(other) {
		t.Error("what one node has is verified without its words")
	}
	if a, b := compared(c.kv), compared(other); a != b {
		t.Errorf("other words make another state: %x and %x", a, b)
	}
	c.kv.Scan(key(tReply), nil, func(k, v []byte) bool {
		r := &pb.Result{}
		decode(v, r)
		if r.Detail == "" {
			return true
		}
		changed := proto.Clone(r).(*pb.Result)
		changed.Status++
		other.Set(k, encode(changed))
		return false
	})
	if compared(c.kv) == compared(other) {
		t.Error("another outcome is the same state")
	}
	if HashWords(key(tReply, "s"), []byte("no message")) != 0 {
		t.Error("damage has words")
	}
}
