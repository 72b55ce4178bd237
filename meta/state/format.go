package state

import (
	"slices"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Format is the newest version of what commands mean, and of the state they make,
// that this program knows. It rises when an older program would make another state
// of the same command.
//
//	1  the first
//	2  a copy being made remembers that placement wished for it (Filling.wish)
//	3  nodes compare states without words (words.go); no volume in use is renamed;
//	   more copies and an undone shrink are held to quotas and to what thick
//	   volumes keep
//	4  a second shrink does not shorten the time for which the first can be undone;
//	   a store can be removed (RemoveStore)
//	5  many volumes can be created by one command (CreateVolumes); the capacity of all
//	   stores is a pair of its own, so that no allocation has to sum them up
//
// Which one a cluster uses is in its state, the same on every node, and never
// falls: the leader raises it once every member knows a newer one. Until then, what
// is newer is left out by every program just as an older one leaves it out, so that
// nodes of both make one state of one log.
const Format = uint32(5)

var formatKey = key(tMeta, "format")

// FormatOf returns the version in use.
func FormatOf(kv KV) uint32 { return max(1, uint32(u64(kv.Get(formatKey)))) }

// NeedsFormat returns the version from which on all of cmd means something.
func NeedsFormat(cmd *pb.Command) uint32 {
	switch cmd.Op.(type) {
	case *pb.Command_CreateVolumes:
		return 5
	case *pb.Command_RemoveStore:
		return 4
	}
	if slices.ContainsFunc(cmd.GetMoveChunks().GetMoves(), func(m *pb.ChunkMove) bool { return m.Wish }) {
		return 2
	}
	return 1
}

// CheckFormat refuses what some member would not understand.
func CheckFormat(kv KV, cmd *pb.Command) error {
	if need, now := NeedsFormat(cmd), FormatOf(kv); need > now {
		return status.Errorf(status.Unsupported, "this needs state version %d and the cluster uses %d: upgrade every metadata node first (`cairn meta ls` shows their versions)", need, now)
	}
	return nil
}

// raiseFormat puts a version in use that every member knows.
func (a *apply) raiseFormat(to uint32) {
	if now := FormatOf(a.kv); to > now {
		if now < 5 && to >= 5 {
			a.kv.Set(capacityKey, put64(sumStores(a.kv)))
		}
		a.kv.Set(formatKey, put64(uint64(to)))
		a.event("state version %d is in use: a metadata node whose program knows only %d starts no more", to, now)
	}
}
