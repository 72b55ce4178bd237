package volume

import (
	"github.com/cairnstore/cairn/proto/ids"
)

// Info is what people want to know about an engine.
type Info struct {
	State    State
	Why      string
	Epoch    ids.Epoch
	Revision uint64
	Size     uint64
	Floor    ids.Version
	InFlight int
	Full     int      // writes in flight that wait for room
	FullOn   []string // hosts whose stores have none
	Stats    Stats
	Layers   int    // of the volume; 1: it has no snapshots
	Merging  bool   // a deleted layer waits to be merged, or is
	MergeWhy string // why that was given up the last time
	Replicas []ReplicaInfo
	Caring   string // what is being repaired, or ought to be; "": nothing
	Filling  int    // copies of chunks being made on other stores
	Share    Share  // it is held to, for what others are promised
}

// ReplicaInfo is the state of one member.
type ReplicaInfo struct {
	Index       int
	Store       ids.StoreID
	Host, Addr  string
	State       string // in-sync, lost, joining, out
	JoinedBytes uint64 // data sent by the running or last join
}

// Info returns a picture of the engine.
func (e *Engine) Info() Info {
	in := Info{State: e.state, Why: e.why, Epoch: e.epoch, Revision: e.revision, Size: e.size, Floor: e.floor,
		InFlight: e.inFlight.len, Stats: e.stats, Layers: max(1, len(e.layers.all)), Merging: e.reclaiming(), MergeWhy: e.reclaimWhy,
		Caring: e.caring(), Filling: len(e.moves.fills), Share: e.throttle.share}
	in.Full, in.FullOn = len(e.full.jobs), e.fullOn()
	for _, r := range e.replicas {
		in.Replicas = append(in.Replicas, ReplicaInfo{Index: r.index, Store: r.store, Host: r.host, Addr: r.addr,
			State: r.stateName(), JoinedBytes: r.joinedBytes})
	}
	return in
}

// State returns what the engine is doing.
func (e *Engine) State() State { return e.state }

// Top returns the layer that is written to.
func (e *Engine) Top() ids.LayerID { return e.layers.top }

// Size returns the volume's size in bytes.
func (e *Engine) Size() uint64 { return e.size }

// Replica returns the store, host and address of member i, for the shell that
// connects to it.
func (e *Engine) Replica(i int) ReplicaInfo {
	r := e.replicas[i]
	return ReplicaInfo{Index: i, Store: r.store, Host: r.host, Addr: r.addr, State: r.stateName()}
}

// Extent is a run of bytes that are all allocated or all not.
type Extent struct {
	Len  uint64
	Hole bool
}

// Extents describes [off, off+n) by the thin map: a hole is what no chunk was
// ever allocated for. It never claims "hole" for what a write may have filled.
func (e *Engine) Extents(off, n uint64) []Extent {
	var out []Extent
	chunkBytes := uint64(e.perChunk) * ids.BlockSize
	for n > 0 {
		step := min(n, chunkBytes-off%chunkBytes)
		i := ids.ChunkIndex(off / chunkBytes)
		_, ok := e.chunks[i]
		ok = ok || e.originHas(i)
		if k := len(out); k > 0 && out[k-1].Hole == !ok {
			out[k-1].Len += step
		} else {
			out = append(out, Extent{step, !ok})
		}
		off, n = off+step, n-step
	}
	return out
}
