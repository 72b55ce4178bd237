package state

import (
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/pb"
)

// Kept answers and events hold sentences, and a program of another version may
// word them otherwise. Nothing depends on them: what nodes compare (at state
// version 3, WordlessFormat) leaves them out, or a rolling upgrade would find
// nodes in doubt that are well. What one node has on its disk is verified with
// them: HashPair.

// WordlessFormat is the state version from which on nodes compare states
// without words.
const WordlessFormat = 3

// Fields that hold words, or messages that do.
const (
	fieldDetail, fieldMembers = 2, 6  // pb.Result
	fieldWhat, fieldOutcome   = 4, 40 // pb.Event
)

// HashWords is what of HashPair is due to words (wrapping): 0 for most pairs.
func HashWords(key, val []byte) uint64 {
	if len(key) == 0 {
		return 0
	}
	var m proto.Message
	switch {
	case key[0] == tReply && hasField(val, fieldDetail, fieldMembers):
		r := &pb.Result{}
		if proto.Unmarshal(val, r) != nil {
			return 0 // damage is found by HashPair
		}
		r.Detail = ""
		for _, mr := range r.Members {
			mr.Detail = ""
		}
		m = r
	case key[0] == tEvent && hasField(val, fieldWhat, fieldOutcome):
		e := &pb.Event{}
		if proto.Unmarshal(val, e) != nil {
			return 0
		}
		e.What, e.Outcome = "", ""
		m = e
	default:
		return 0
	}
	return HashPair(key, val) - HashPair(key, encode(m))
}

// hasField reports whether an encoded message has one of two fields.
func hasField(b []byte, a, or protowire.Number) bool {
	for len(b) > 0 {
		num, _, n := protowire.ConsumeField(b)
		if n < 0 {
			return true // decoding fails, too
		}
		if num == a || num == or {
			return true
		}
		b = b[n:]
	}
	return false
}
