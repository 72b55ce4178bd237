package server

import (
	"slices"
	"sync"
	"time"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
)

// care finds volumes that nobody has attached and that need repair, a few at
// each renewal, and asks a host with a good copy to do it. It is a leader's
// memory: another leader may ask another host, whose attach is then refused or
// ends the first one's session.
type care struct {
	mu    sync.Mutex // guards all fields
	after uint64     // the volume looked at last
	asked map[uint64]time.Duration
}

const (
	carePerRenew = 64 // volumes looked at
	careAsk      = 2  // named in one answer
	careAgain    = 30 * time.Second
)

// find names volumes for a host to repair. held says whether a maintenance
// session's epoch is alive, wished whether placement wants anything of a volume.
func (c *care) find(kv state.KV, host string, now time.Duration, held func(*pb.Volume) bool, wished func(uint64) bool) (names []string) {
	if state.HostByName(kv, host).GetDrained() {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.asked == nil {
		c.asked = map[uint64]time.Duration{}
	}
	vs := state.VolumesAfter(kv, c.after, carePerRenew)
	c.after = 0
	if len(vs) == carePerRenew {
		c.after = vs[len(vs)-1].Id
	}
	for _, v := range vs {
		last, ok := c.asked[v.Id]
		idle := v.HolderSession == "" || v.Maintenance && !held(v)
		switch {
		case !idle || v.DeletedUnixNs > 0 || !hasGood(v, host) || !state.NeedsCare(kv, v) && !wished(v.Id):
			if ok && now-last >= careAgain {
				delete(c.asked, v.Id)
			}
		case len(names) < careAsk && (!ok || now-last >= careAgain):
			c.asked[v.Id] = now
			names = append(names, v.Name)
		}
	}
	return names
}

// hasGood reports whether a host has a member that is in sync.
func hasGood(v *pb.Volume, host string) bool {
	return slices.ContainsFunc(v.Members, func(m *pb.Member) bool { return m.Host == host && m.InSync })
}
