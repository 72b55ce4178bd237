package server

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
)

// Counts are what a node has done since it started.
type Counts struct {
	Commands, Refused, Queries, Renewals uint64
	Watchers                             int64
}

type counters struct{ commands, refused, queries, renewals atomic.Uint64 }

// Counts returns what this node has done.
func (s *Server) Counts() Counts {
	c := &s.counters
	return Counts{c.commands.Load(), c.refused.Load(), c.queries.Load(), c.renewals.Load(), s.watches.Load()}
}

// NodeInfo is what the node says of itself.
func (s *Server) NodeInfo() *pb.NodeReply { return s.node() }

// Census is the cluster as its leader sees it.
type Census struct {
	Volumes, Deleted, Attached, Degraded, LastCopy int // LastCopy: at most one of the copies is in sync, of several
	HostsUp, HostsDown, StoresOK, StoresBad        int
	UsedBytes, CapacityBytes                       uint64
	FillBytesPerSecond                             float64 // lately; below 0: it empties
	Pool                                           *pb.Pool
}

// census keeps one for a while: it reads every volume.
type census struct {
	mu   sync.Mutex // guards both below
	at   time.Duration
	last *Census
}

const censusAge = 20 * time.Second

// Census counts volumes, hosts and stores; nil when this node does not lead. It
// may be 20 s old.
func (s *Server) Census() *Census {
	t, err := s.lead()
	if err != nil {
		return nil
	}
	k := &s.census
	k.mu.Lock()
	defer k.mu.Unlock()
	now := boottime()
	if k.last != nil && now-k.at < censusAge {
		return k.last
	}
	c := &Census{}
	err = s.fsm.read(func(kv state.KV) {
		c.Pool = state.PoolOf(kv)
		for _, v := range state.Volumes(kv) {
			c.count(v)
		}
		c.Deleted = len(state.DeletedVolumes(kv))
		for _, h := range t.hostStates(kv, now) {
			c.countHost(h)
		}
	})
	if err != nil {
		return nil
	}
	k.at, k.last = now, c
	return c
}

func (c *Census) count(v *pb.Volume) {
	c.Volumes++
	if v.HolderSession != "" {
		c.Attached++
	}
	out := 0
	for _, m := range v.Members {
		if !m.InSync {
			out++
		}
	}
	if out > 0 {
		c.Degraded++
		if int(v.Replicas)-out <= 1 {
			c.LastCopy++
		}
	}
}

func (c *Census) countHost(h *pb.HostState) {
	if h.Up {
		c.HostsUp++
	} else {
		c.HostsDown++
	}
	for _, st := range h.Stores {
		switch {
		case st.Store.Retired:
			continue
		case st.Up:
			c.StoresOK++
		default:
			c.StoresBad++
		}
		if st.Usage == nil {
			continue // this leader has not heard of it: it is not empty for that
		}
		c.CapacityBytes += st.Store.CapacityBytes
		c.UsedBytes += st.Usage.GetUsedBytes()
		if st.WatchedMs >= time.Minute.Milliseconds() {
			c.FillBytesPerSecond += st.FillBytesPerSecond
		}
	}
}

// SecondsToFull is when the pool is full at the rate seen lately; below 0: it does
// not fill now.
func (c *Census) SecondsToFull() float64 {
	if c.FillBytesPerSecond <= 0 {
		return -1
	}
	return float64(c.CapacityBytes-min(c.UsedBytes, c.CapacityBytes)) / c.FillBytesPerSecond
}
