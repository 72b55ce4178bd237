// Package driver lets the metadata service place chunks and VMs by the
// policies of package placement.
//
// Duty: translate the leader's picture into a fleet, ask the core, and translate
// its decisions into binds; and, on a host, carry out what was decided for its
// VMs (Keeper). Floor: F4. It keeps nothing: the seed of a placement is a hash of
// its request, so that the same request has the same answer on every node.
//
//	driver   new chunks
//	fleet    a picture of the cluster as a fleet
//	vms      a host for a VM; the queue's turn
//	answer   explanations, prices, plans of moves
//	keeper   a host carries out what was decided
package driver

import (
	"encoding/binary"
	"hash/fnv"
	"slices"

	"github.com/cairnstore/cairn/meta/server"
	"github.com/cairnstore/cairn/placement"
	"github.com/cairnstore/cairn/proto/ids"
)

// minReady is how many replicas of a new chunk must be on stores that take
// writes at once. One: a volume whose other members are down is already served
// by that many, and its guest must not hang because it touches a new chunk.
const minReady = 1

type placer struct{}

var _ server.Placer = placer{}

// New returns a placer. The policy for VMs is the cluster's, in each picture.
func New() server.Placer { return placer{} }

// PlaceChunks implements server.Placer.
func (placer) PlaceChunks(req server.ChunkRequest) ([][]ids.StoreID, error) {
	plan, err := placement.PlaceChunks(ChunkRequest(req))
	return plan.Chunks, err
}

// ChunkRequest translates the leader's request, also for explaining it.
func ChunkRequest(req server.ChunkRequest) placement.ChunkRequest {
	out := placement.ChunkRequest{Seed: seed(req), Count: req.Count, Replicas: req.Replicas,
		ChunkBytes: req.ChunkBytes, PreferHost: req.PreferHost, Slow: req.Slow, MinReady: minReady}
	for _, s := range req.Stores {
		out.Stores = append(out.Stores, placement.Store{ID: s.ID, Host: s.Host, Domain: s.Domain, Up: s.Up,
			Member: s.Member, InSync: s.InSync, CapacityBytes: s.CapacityBytes, UsedBytes: s.UsedBytes, Slow: s.Slow, Drained: s.Drained})
	}
	return out
}

// seed hashes what tells requests apart: the volume (several ask between two
// heartbeats, and must not all draw the same stores), the writer's host, and
// what each store holds. The stores are sorted first: their order says nothing.
func seed(req server.ChunkRequest) uint64 {
	stores := slices.SortedFunc(slices.Values(req.Stores), func(a, b server.StoreView) int { return slices.Compare(a.ID[:], b.ID[:]) })
	b := binary.LittleEndian.AppendUint64(append([]byte(req.PreferHost), 0), uint64(req.Volume))
	for _, s := range stores {
		b = append(b, s.ID[:]...)
		b = binary.LittleEndian.AppendUint64(b, s.UsedBytes)
		member := byte(0)
		if s.Member {
			member = 1
		}
		b = append(b, member)
	}
	h := fnv.New64a()
	_, _ = h.Write(b) // a hash.Hash never returns an error
	return h.Sum64()
}
