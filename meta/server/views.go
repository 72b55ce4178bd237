package server

import (
	"bytes"
	"math"
	"time"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// upFor is how long a host counts as up after a heartbeat (every 2 s). A new
// leader, who has heard nobody yet, takes every host for up for as long.
const upFor = 3 * time.Second

// hear notes a heartbeat of a registered host.
func (t *tenure) hear(host string, usage []*pb.StoreUsage, now time.Duration) {
	b := &beat{at: now, usage: map[string]*pb.StoreUsage{}}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fills == nil {
		t.fills = map[string]*fill{}
	}
	for _, u := range usage {
		id := string(u.Store)
		b.usage[id] = u
		if t.fills[id] == nil {
			t.fills[id] = &fill{began: now, at: now, used: u.UsedBytes}
		}
		t.fills[id].note(u.UsedBytes, now)
	}
	t.hosts[host] = b
}

// fill is how fast a store has filled lately: an average over the changes, in
// which one that is fillMemory old counts a third of one that is new.
type fill struct {
	began, at time.Duration
	used      uint64
	rate      float64 // bytes a second
}

const (
	fillMemory = 30 * time.Minute
	fillStep   = 10 * time.Second // between two looks
)

func (f *fill) note(used uint64, now time.Duration) {
	d := now - f.at
	if d < fillStep {
		return
	}
	rate := (float64(used) - float64(f.used)) / d.Seconds()
	weight := 1 - math.Exp(-d.Seconds()/min(fillMemory, now-f.began).Seconds())
	f.rate += (rate - f.rate) * weight
	f.used, f.at = used, now
}

// filling returns a store's rate, and over how long it was seen.
func (t *tenure) filling(id []byte) (rate float64, over time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if f := t.fills[string(id)]; f != nil {
		return f.rate, f.at - f.began
	}
	return 0, 0
}

// host returns the last heartbeat, if any, and whether the host is up.
func (t *tenure) host(name string, now time.Duration) (*beat, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	b := t.hosts[name]
	if b == nil {
		return nil, now < t.since+upFor
	}
	return b, now < b.at+upFor
}

// storeUp: its host is up, and the store is well as far as is known.
func storeUp(b *beat, up bool, id []byte) (*pb.StoreUsage, bool) {
	if b == nil {
		return nil, up
	}
	u := b.usage[string(id)]
	return u, up && u != nil && u.State == "ok"
}

// hostStates is the answer to a query for hosts.
func (t *tenure) hostStates(kv state.KV, now time.Duration) []*pb.HostState {
	stores := map[string][]*pb.Store{}
	for _, s := range state.Stores(kv) {
		stores[s.Host] = append(stores[s.Host], s)
	}
	var out []*pb.HostState
	for _, h := range state.Hosts(kv) {
		b, up := t.host(h.Name, now)
		hs := &pb.HostState{Host: h, Up: up, LastSeenMs: -1}
		if b != nil {
			hs.LastSeenMs = (now - b.at).Milliseconds()
		}
		if !up {
			hs.ToldUnixNs = t.silentSince(h.Name)
		}
		for _, s := range stores[h.Name] {
			u, sup := storeUp(b, up, s.Id)
			rate, over := t.filling(s.Id)
			hs.Stores = append(hs.Stores, &pb.StoreState{Store: s, Usage: u, Up: sup, FillBytesPerSecond: rate, WatchedMs: over.Milliseconds()})
		}
		out = append(out, hs)
	}
	return out
}

// place fills in the chunks of an allocation. Indices that have a chunk keep
// it; an allocation the state machine will refuse anyway goes on as it is.
func (s *Server) place(t *tenure, op *pb.Allocate) error {
	op.Chunks = nil
	if len(op.Indices) > state.MaxIndices {
		return nil
	}
	var req ChunkRequest
	var missing []uint32
	err := s.fsm.read(func(kv state.KV) {
		v := state.VolumeByID(kv, op.VolumeId)
		if v == nil {
			return
		}
		seen := map[uint32]bool{}
		for _, ix := range op.Indices {
			if !seen[ix] && state.ChunkAt(kv, v.Id, ix) == nil {
				missing = append(missing, ix)
			}
			seen[ix] = true
		}
		req = ChunkRequest{Volume: ids.VolumeID(v.Id), Count: len(missing), Replicas: int(v.Replicas), ChunkBytes: v.ChunkBytes, PreferHost: op.PreferHost}
		req.Stores = t.storeViews(kv, v, boottime())
	})
	if err != nil || len(missing) == 0 {
		return err
	}
	places, err := s.cfg.Placer.PlaceChunks(req)
	if err != nil {
		return err
	}
	if len(places) != len(missing) {
		return status.Errorf(status.Internal, "the placer gave %d places for %d chunks", len(places), len(missing))
	}
	t.use(op.VolumeId, missing, boottime())
	for i, stores := range places {
		c := &pb.Chunk{Index: missing[i]}
		for _, id := range stores {
			c.Stores = append(c.Stores, bytes.Clone(id[:]))
		}
		op.Chunks = append(op.Chunks, c)
	}
	return nil
}

// storeViews are the stores in service as placement sees them, for chunks of v.
func (t *tenure) storeViews(kv state.KV, v *pb.Volume, now time.Duration) []StoreView {
	hosts := map[string]*pb.Host{}
	for _, h := range state.Hosts(kv) {
		hosts[h.Name] = h
	}
	members := map[string]*pb.Member{}
	for _, m := range v.Members {
		members[string(m.Store)] = m
	}
	var out []StoreView
	for _, st := range state.Stores(kv) {
		id, err := ids.StoreIDFromBytes(st.Id)
		h, m := hosts[st.Host], members[string(st.Id)]
		if err != nil || st.Retired || h == nil {
			continue
		}
		b, up := t.host(st.Host, now)
		u, sup := storeUp(b, up, st.Id)
		view := StoreView{ID: id, Host: st.Host, Domain: state.Label(h, v.Domain), Up: sup,
			Member: m != nil, InSync: m.GetInSync(), CapacityBytes: st.CapacityBytes, UsedBytes: u.GetLiveBytes(), Slow: state.ClassOf(st) == state.ClassSlow, Drained: h.Drained}
		if c := u.GetCapacityBytes(); c > 0 {
			view.CapacityBytes = c
		}
		out = append(out, view)
	}
	return out
}
