package main

import (
	"strings"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Each kind of trouble is found, with its severity, and says what it means.
func TestHealthFindsWhatIsWrong(t *testing.T) {
	now := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	well := func() *clusterView {
		w := &clusterView{}
		for _, n := range []string{"1", "2", "3"} {
			w.Meta = append(w.Meta, metaView{Name: "meta-" + n, Role: "voter", State: "follower", Applied: 9, StateHash: "aa", FreeBytes: 9 << 30, Program: "aaa"})
			w.Hosts = append(w.Hosts, hostView{Name: "host-" + n, Up: true, answers: true, Program: "aaa", Labels: map[string]string{"rack": "r" + n}, Stores: []storeView{{ID: strings.Repeat(n, 32), State: "ok", Capacity: 100 << 30, Used: 50 << 30, WatchedMs: 600_000}}})
		}
		v := volumeView{Name: "v", Replicas: 3, Holder: "host-1", Domain: "host", serves: "serving"}
		for _, n := range []string{"1", "2", "3"} {
			v.Members = append(v.Members, memberView{Store: strings.Repeat(n, 32), Host: "host-" + n, InSync: true})
		}
		w.Volumes = []volumeView{v}
		return w
	}
	if fs := health(well(), now); len(fs) != 0 {
		t.Fatalf("a healthy cluster: %v", fs)
	}
	old := well() // what is over, or done, is no news
	old.Volumes[0].erred, old.Volumes[0].erredAt = 1, now.Add(-erredFor).UnixNano()
	old.Hosts[0].Stores = append(old.Hosts[0].Stores, storeView{ID: strings.Repeat("7", 32), State: "down", Retired: true})
	if fs := health(old, now); len(fs) != 0 {
		t.Fatalf("what is over: %v", fs)
	}
	for _, c := range []struct {
		what     string
		harm     func(w *clusterView)
		severity string
		says     []string
	}{
		{"a metadata node away", func(w *clusterView) { w.Meta[1].State, w.Meta[1].Heard = "unreachable", "then" }, critical, []string{"meta-2", "2 of 3", "since then", "0 more may fail"}},
		{"one of five away", func(w *clusterView) {
			w.Meta = append(w.Meta, w.Meta[0], w.Meta[2])
			w.Meta[1].State = "unreachable"
		}, warning, []string{"4 of 5", "1 more may fail"}},
		{"no quorum", func(w *clusterView) { w.Meta[1].State, w.Meta[2].State = "unreachable", "unreachable" }, critical, []string{"nothing can be changed; guests"}},
		{"states that differ", func(w *clusterView) { w.Meta[2].StateHash = "bb" }, critical, []string{"different states", "command 9"}},
		{"an upgrade half done", func(w *clusterView) {
			w.Meta[0].Knows, w.Meta[1].Knows, w.Meta[2].Knows = 2, 1, 2
			w.Meta[0].Uses = 1
		}, notice, []string{"knows state version 2, meta-2 (1)", "uses version 1", "upgrade these"}},
		{"a metadata disk", func(w *clusterView) { w.Meta[0].FreeBytes = 100 << 20 }, critical, []string{"100 MiB left"}},
		{"a host down", func(w *clusterView) { w.Hosts[0].Up, w.Hosts[0].LastSeenMs = false, 65_000 }, warning,
			[]string{"host-1 is down", formatTime(now.Add(-65 * time.Second).UnixNano()), "without their copy there: v;", "without service: v", "replace_after", "--takeover"}},
		{"a drained host", func(w *clusterView) {
			w.Hosts, w.Volumes[0].Members[2].Host = append(w.Hosts, hostView{Name: "host-4", Drained: true, Up: true}), "host-3"
		}, notice, []string{"host-4", "nothing is left", "resume"}},
		{"a failed store", func(w *clusterView) { w.Hosts[1].Stores[0].State = "failed: EIO" }, warning, []string{"store 22222222", "EIO", "serve: v;", "store retire 22222222"}},
		{"a failed store since its copy was out", func(w *clusterView) {
			w.Hosts[1].Stores[0].State = "failed: EIO"
			w.Volumes[0].Members[1].InSync, w.Volumes[0].Members[1].outUnixNs = false, now.UnixNano()
		}, warning, []string{"store 22222222", "since " + formatTime(now.UnixNano())}},
		{"a host that hangs", func(w *clusterView) { w.Hosts[1].Silent, w.Hosts[1].Control = true, "h2:1" }, warning, []string{"host-2 sends heartbeats and does not answer", "h2:1"}},
		{"a host's clock", func(w *clusterView) { w.Hosts[1].ClockMs = -93_000 }, notice, []string{"clock of host host-2 is 1m33s behind"}},
		{"this machine's clock", func(w *clusterView) {
			for i := range w.Hosts {
				w.Hosts[i].ClockMs, w.Meta[i].ClockMs = 60_000, 61_000
			}
			w.Meta[2].ClockMs = 0
		}, notice, []string{"this machine is 1m0s behind that of most", "off by as much"}},
		{"and one that is off from the others", func(w *clusterView) {
			for i := range w.Hosts {
				w.Hosts[i].ClockMs, w.Meta[i].ClockMs = 60_000, 60_000
			}
			w.Meta[2].ClockMs = 0
		}, notice, []string{"meta-3 is 1m0s behind most others'"}},
		{"programs", func(w *clusterView) { w.Hosts[1].Program, w.Meta[0].Program = "bbb", "" }, notice, []string{"aaa on meta-2, meta-3, host-1, host-3; bbb on host-2; one that does not say which on meta-1", "half done"}},
		{"damage that others have whole", func(w *clusterView) { w.Volumes[0].Members[1].BadBlocks = 7 }, warning, []string{"volume v: its copy on host host-2 (store 22222222) has 7 damaged blocks", "read from the other copies", "within a minute"}},
		{"damage of a free volume", func(w *clusterView) { w.Volumes[0].Members[1].BadBlocks, w.Volumes[0].Holder = 7, "" }, warning, []string{"volume attach v"}},
		{"damage of the only copy", func(w *clusterView) {
			w.Volumes[0].Members, w.Volumes[0].Replicas = w.Volumes[0].Members[:1], 1
			w.Volumes[0].Members[0].BadBlocks = 7
		}, critical, []string{"7 damaged blocks", "I/O error", "backup", "store show 11111111"}},
		{"damage where the others are away", func(w *clusterView) {
			w.Volumes[0].Members[0].BadBlocks = 7
			w.Hosts[1].Up, w.Hosts[2].Up = false, false
		}, critical, []string{"no other copy can be asked"}},
		{"a host whose silence the leader has read of", func(w *clusterView) {
			w.Hosts[0].Up, w.Hosts[0].LastSeenMs, w.Hosts[0].toldUnixNs = false, -1, now.UnixNano()
		}, warning,
			[]string{"since " + formatTime(now.UnixNano()) + " at the latest"}},
		{"a store that its host has not open", func(w *clusterView) { w.Hosts[1].Stores[0].State = "down" }, warning, []string{"store 22222222: host host-2 is up and does not have it open"}},
		{"a retired store", func(w *clusterView) { w.Hosts[1].Stores[0].Retired = true }, notice, []string{"store 22222222 on host host-2 is retired", "copies of v"}},
		{"an empty retired store", func(w *clusterView) {
			w.Hosts[1].Stores = append(w.Hosts[1].Stores, storeView{ID: strings.Repeat("7", 32), State: "ok", Retired: true})
		}, notice, []string{"store 77777777", "its disk may go"}},
		{"a metadata node's clock", func(w *clusterView) { w.Meta[1].ClockMs = 3_600_000 }, notice, []string{"meta-2 is 1h0m0s ahead", "deadlines"}},
		{"errors of a guest", func(w *clusterView) {
			v := &w.Volumes[0]
			v.erred, v.erredAt, v.erredBy = 3, now.UnixNano(), status.Corrupt.String()
		}, critical, []string{"volume v: requests of its users", "3 of them, the last at " + formatTime(now.UnixNano()), "store scrub"}},
		{"no room for a guest", func(w *clusterView) {
			v := &w.Volumes[0]
			v.erred, v.erredAt, v.erredBy = 3, now.UnixNano(), status.NoSpace.String()
		}, warning, []string{"cairn df"}},
		{"a volume that waits", func(w *clusterView) { w.Volumes[0].serves = "attaching: waiting for a member" }, critical, []string{"volume v does not serve on host host-1", "waiting for a member"}},
		{"a full store under a volume", func(w *clusterView) { w.Volumes[0].full, w.Volumes[0].fullOn = 3, []string{"host-2"} }, critical, []string{"volume v: writes wait for room on host-2 (3 of them)"}},
		{"no copy to be reached", func(w *clusterView) {
			for i := range w.Hosts {
				w.Hosts[i].Up, w.Hosts[i].LastSeenMs = false, 5_000
			}
		}, critical, []string{"volume v: 3 of its 3 stores", "11111111 on host-1: host down", "whoever asks waits", "nowhere else to make them", "in 0 hosts", formatTime(now.Add(-5 * time.Second).UnixNano())}},
		{"a copy that catches up", func(w *clusterView) {
			m := &w.Volumes[0].Members[1]
			m.InSync, m.State, m.JoinedBytes = false, "joining", 5<<20
		}, warning, []string{"catching up", "22222222 on host-2 has got 5 MiB"}},
		{"a drain with nowhere to go", func(w *clusterView) { w.Hosts[2].Drained = true }, warning, []string{"copies of v", "cannot finish", "the 2 hosts in service", "nothing new but what has no other place", "new chunks of v go there too"}},
		{"a drain with a rack too few", func(w *clusterView) {
			w.Hosts, w.Volumes[0].Domain = append(w.Hosts, hostView{Name: "host-4", Up: true, Labels: map[string]string{"rack": "r2"}, Stores: w.Hosts[1].Stores}), "rack"
			w.Hosts[2].Drained = true
		}, warning, []string{"cannot finish", "the 2 racks in service"}},
		{"a drain of the host that has it attached", func(w *clusterView) {
			w.Hosts = append(w.Hosts, hostView{Name: "host-4", Up: true, Stores: w.Hosts[2].Stores})
			w.Hosts[0].Drained = true
		}, notice, []string{"attached there: v", "--hand-over"}},
		{"a store at 76 %", func(w *clusterView) { w.Hosts[1].Stores[0].Used = 76 << 30 }, notice, []string{"76 % full", "does not fill now"}},
		{"a store at 86 % that fills", func(w *clusterView) {
			s := &w.Hosts[1].Stores[0]
			s.Used, s.Live, s.FillRate, s.WatchedMs = 86<<30, 80<<30, 1<<20, 600_000
		}, warning, []string{"86 % full", "full in 3h59m0s", "6 GiB of it was overwritten or removed"}},
		{"a pool that a leader just hears of", func(w *clusterView) {
			for i := range w.Hosts {
				w.Hosts[i].Stores[0].Used, w.Hosts[i].Stores[0].WatchedMs = 76<<30, 0
			}
		}, notice, []string{"the pool is 76 %", "not known yet"}},
		{"a full pool with a store away", func(w *clusterView) {
			for i := range w.Hosts {
				w.Hosts[i].Stores[0].Used = 86 << 30
			}
			w.Hosts[0].Stores[0].Used, w.Hosts[0].Stores[0].State = 0, "down"
		}, warning, []string{"the pool is 86 % full: 172 GiB of 200 GiB"}},
		{"a pool at 95 %", func(w *clusterView) {
			for i := range w.Hosts {
				w.Hosts[i].Stores[0].Used = 95 << 30
			}
			w.mark = &pb.PoolMark{Percent: 95, UnixNs: now.UnixNano()}
		}, critical, []string{"the pool is 95 % full", "since " + formatTime(now.UnixNano())}},
		{"a copy out", func(w *clusterView) {
			m := &w.Volumes[0].Members[1]
			m.InSync, m.outUnixNs = false, now.UnixNano()
		}, warning, []string{"1 of its 3 stores", "22222222 on host-2: well, and not reached by host-1", "2 good copies left", "host-1 reaches the data address of host-2", "replace_after"}},
		{"two copies out of a free volume", func(w *clusterView) {
			w.Volumes[0].Members[0].InSync, w.Volumes[0].Members[1].InSync, w.Volumes[0].Holder = false, false, ""
		}, critical, []string{"one good copy left", "volume attach v"}},
		{"a closed volume", func(w *clusterView) { w.Volumes[0].Closed = true }, warning, []string{"volume trust v"}},
		{"a quota", func(w *clusterView) { w.Tenants = []tenantView{{Name: "acme", Logical: 96, LogicalQuota: 100}} }, notice, []string{"tenant acme", "96 %"}},
	} {
		w := well()
		c.harm(w)
		fs := health(w, now)
		found := false
		for _, f := range fs {
			all := true
			for _, s := range c.says {
				all = all && strings.Contains(f.sentence(), s)
			}
			found = found || all && f.Severity == c.severity
		}
		if !found {
			t.Errorf("%s: found %+v, want a %s saying %q", c.what, fs, c.severity, c.says)
		}
	}
}
