package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
)

// clusterView is the cluster as `cairn status -o json` shows it.
type clusterView struct {
	Cluster  string       `json:"cluster"`
	Problems []string     `json:"problems"` // one sentence each
	Evidence []finding    `json:"evidence"` // the same, taken apart
	Meta     []metaView   `json:"meta"`
	Hosts    []hostView   `json:"hosts"`
	Volumes  []volumeView `json:"volumes"`
	Tenants  []tenantView `json:"tenants"`

	mark *pb.PoolMark // the threshold the event log says the pool has passed
}

type metaView struct {
	ID        string `json:"id"`
	Name      string `json:"name"`
	Role      string `json:"role"` // voter, learner, none
	Addr      string `json:"addr"`
	State     string `json:"state"`
	Leader    bool   `json:"leader"`
	Term      uint64 `json:"term"`
	Applied   uint64 `json:"applied"`
	StateHash string `json:"stateHash"`
	FreeBytes uint64 `json:"freeBytes"`         // on its disk; 0: not known
	Knows     uint32 `json:"stateVersionKnown"` // 0: it does not answer
	Uses      uint32 `json:"stateVersionInUse"`
	Detail    string `json:"detail,omitempty"`
	Heard     string `json:"lastHeard,omitempty"` // of an unreachable one, by the leader
	ClockMs   int64  `json:"clockMs"`             // ahead of this machine's
	Program   string `json:"program"`             // the commit it was built from; empty: it does not say
}

type hostView struct {
	Name       string            `json:"name"`
	Up         bool              `json:"up"`
	Drained    bool              `json:"drained"`
	LastSeenMs int64             `json:"lastSeenMs"`
	Data       string            `json:"dataAddr"`
	Control    string            `json:"controlAddr"`
	CPUs       uint32            `json:"cpus"`
	Memory     uint64            `json:"memoryBytes"`
	Stores     []storeView       `json:"stores"`
	Labels     map[string]string `json:"labels"`
	Silent     bool              `json:"silent"`  // no answer to this machine, though its heartbeats arrive
	ClockMs    int64             `json:"clockMs"` // ahead of this machine's; 0 if it does not answer
	Program    string            `json:"program"` // the commit it was built from; empty: it does not say

	answers    bool  // to this machine
	toldUnixNs int64 // of one that is down: when the event log said so
}

type storeView struct {
	ID          string `json:"id"`
	Host        string `json:"host"`
	Incarnation uint64 `json:"incarnation"`
	Capacity    uint64 `json:"capacityBytes"`
	Used        uint64 `json:"usedBytes"` // segments in use
	Live        uint64 `json:"liveBytes"` // blocks that can still be read
	Class       string `json:"class"`     // fast, slow
	State       string `json:"state"`
	Retired     bool   `json:"retired"`
	FillRate    int64  `json:"fillBytesPerSecond"` // lately
	WatchedMs   int64  `json:"watchedMs"`          // over how long that was seen
}

// membersWait is for how long the leader is asked about nodes that are not in
// this side's list.
const membersWait = 2 * time.Second

func (s *session) metaViews(ctx context.Context) []metaView {
	out := []metaView{}
	nodes := s.meta.Nodes(ctx)
	if slices.ContainsFunc(nodes, func(n *pb.NodeReply) bool { return n.Leader || n.LeaderAddr != "" }) {
		mctx, cancel := context.WithTimeout(ctx, membersWait)
		defer cancel()
		if all, err := s.meta.Members(mctx); err == nil { // without a leader: what each says of itself
			nodes = all
		}
	}
	for _, n := range nodes {
		heard := ""
		if n.HeardUnixNs > 0 {
			heard = formatTime(n.HeardUnixNs)
		}
		out = append(out, metaView{Heard: heard, ClockMs: clockOff(n.UnixNs, time.Now()), Program: n.Program, ID: n.Id, Name: n.Name, Role: n.Role, Addr: n.Addr, State: n.State, Leader: n.Leader, Term: n.Term, Applied: n.Applied,
			StateHash: fmt.Sprintf("%016x", n.StateHash), FreeBytes: n.FreeBytes, Knows: n.Format, Uses: n.FormatInUse, Detail: n.Detail})
	}
	return out
}

func (s *session) hostViews(ctx context.Context) ([]hostView, error) {
	hosts, err := s.hosts(ctx)
	if err != nil {
		return nil, err
	}
	out := []hostView{}
	for _, h := range hosts {
		out = append(out, viewHost(h))
	}
	return out, nil
}

func viewHost(h *pb.HostState) hostView {
	w := hostView{Name: h.Host.Name, Up: h.Up, Drained: h.Host.Drained, LastSeenMs: h.LastSeenMs, Data: h.Host.DataAddr, Control: h.Host.ControlAddr,
		CPUs: h.Host.Cpus, Memory: h.Host.MemoryBytes, Labels: h.Host.Labels, toldUnixNs: h.ToldUnixNs, Stores: []storeView{}}
	if w.Labels == nil {
		w.Labels = map[string]string{}
	}
	for _, st := range h.Stores {
		v := storeView{ID: fmt.Sprintf("%x", st.Store.Id), Host: st.Store.Host, Incarnation: st.Store.Incarnation, Class: state.ClassOf(st.Store),
			Capacity: st.Store.CapacityBytes, Used: st.Usage.GetUsedBytes(), Live: st.Usage.GetLiveBytes(), State: st.Usage.GetState(),
			Retired: st.Store.Retired, FillRate: int64(st.FillBytesPerSecond), WatchedMs: st.WatchedMs}
		switch {
		case !st.Up && (!h.Up || v.State == "" || v.State == "ok"):
			v.State = "down"
		case v.State == "":
			v.State = "ok"
		}
		w.Stores = append(w.Stores, v)
	}
	return w
}

// is says how a store is, for people.
func (s storeView) is() string {
	if s.Retired {
		return s.State + ", retired"
	}
	return s.State
}

func seen(h hostView) string {
	switch {
	case h.Up && h.Drained:
		return "up, drained"
	case h.Up:
		return "up"
	case h.LastSeenMs < 0:
		return "down: not heard of since the metadata leader began"
	}
	return fmt.Sprintf("down for %v", (time.Duration(h.LastSeenMs) * time.Millisecond).Round(time.Second))
}

// clockOff is how many milliseconds a clock was ahead of now, the moment its word
// came; 0 if it said nothing.
func clockOff(unixNs int64, now time.Time) int64 {
	if unixNs == 0 {
		return 0
	}
	return time.Unix(0, unixNs).Sub(now).Milliseconds()
}

// hostWait bounds the wait for one host's word, and hostsAtOnce how many are asked
// at once.
const (
	hostWait    = 2 * time.Second
	hostsAtOnce = 64
)

// said asks every host that is up for what its gateway and stores do, and notes who
// does not answer.
func (s *session) said(ctx context.Context, hosts []*pb.HostState, views []hostView) map[string]*pb.HostStatusReply {
	reps := make([]*pb.HostStatusReply, len(hosts))
	var wg sync.WaitGroup
	turns := make(chan struct{}, hostsAtOnce)
	for i, h := range hosts {
		if !h.Up {
			continue
		}
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			ctx, cancel := context.WithTimeout(ctx, hostWait)
			defer cancel()
			rep, err := callHost(ctx, h.Host, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostStatusReply, error) {
				return hc.HostStatus(ctx, &pb.HostStatusRequest{})
			})
			if views[i].Silent = err != nil; err == nil {
				reps[i], views[i].ClockMs, views[i].Program, views[i].answers = rep, clockOff(rep.UnixNs, time.Now()), rep.Program, true
			}
		})
	}
	wg.Wait()
	out := map[string]*pb.HostStatusReply{}
	for i, r := range reps {
		if r != nil {
			out[hosts[i].Host.Name] = r
		}
	}
	return out
}

// fresh takes what a host says of its stores itself: metadata knows it since the last
// heartbeat, and a new leader not at all before the first.
func (h *hostView) fresh(st *pb.HostStatusReply) {
	for _, u := range st.GetStores() {
		for i := range h.Stores {
			if s := &h.Stores[i]; s.ID == fmt.Sprintf("%x", u.Store) && u.CapacityBytes > 0 {
				s.Capacity, s.Used, s.Live = u.CapacityBytes, u.UsedBytes, u.LiveBytes
			}
		}
	}
}

// cluster gathers everything `cairn status` shows. What it waits for is asked for at
// the same time: it is to answer within 5 seconds whoever is away.
func (s *session) cluster(ctx context.Context) (*clusterView, error) {
	w := &clusterView{Problems: []string{}, Evidence: []finding{}, Hosts: []hostView{}, Tenants: []tenantView{}, Volumes: []volumeView{}}
	var wg sync.WaitGroup
	defer wg.Wait()
	nodes := make(chan []metaView, 1)
	wg.Go(func() { nodes <- s.metaViews(ctx) })
	rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volumes{Volumes: true}})
	if err != nil {
		w.Meta = <-nodes
		w.find(noMetadata(err))
		return w, err
	}
	w.Cluster = rep.ClusterId
	hrep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Hosts{Hosts: true}})
	if err != nil {
		return nil, err
	}
	hosts := hrep.Hosts
	w.mark = hrep.PoolMark
	for _, h := range hosts {
		w.Hosts = append(w.Hosts, viewHost(h))
	}
	if w.Tenants, err = s.tenants(ctx); err != nil {
		return nil, err
	}
	var network *netView
	var nerr error
	wg.Go(func() { network, nerr = s.netView(ctx) })
	said := s.said(ctx, hosts, w.Hosts)
	w.Meta = <-nodes
	wg.Wait()
	for i := range w.Hosts {
		w.Hosts[i].fresh(said[w.Hosts[i].Name])
	}
	for _, v := range rep.Volumes {
		x := viewVolume(v)
		if st := said[v.HolderHost]; st != nil {
			x.merge(v, st)
		}
		x.noteBad(v.Id, said)
		w.Volumes = append(w.Volumes, x)
	}
	fs := health(w, time.Now())
	if nerr != nil {
		return nil, nerr
	}
	for _, p := range network.Problems {
		fs = append(fs, finding{Severity: warning, What: p, Means: "traffic takes other paths while there are any; a host without one has its copies left out",
			Next: "`cairn net show` has the whole picture; what works again is used again by itself"})
	}
	slices.SortStableFunc(fs, func(a, b finding) int { return rank(b.Severity) - rank(a.Severity) })
	w.find(fs...)
	return w, nil
}

func statusCommand(c *cli) *cobra.Command {
	var out outputFlag
	var exit bool
	cmd := &cobra.Command{
		Use: "status", Short: "What the cluster is, and what is wrong with it", Args: cobra.NoArgs,
		Long: `What the cluster is, and what is wrong with it, the worst first: !! one more loss takes data
or service away, or has; ! something is gone, nothing is lost; - good to know.

The exit status says whether the cluster could be looked at. With --exit-code it says what
was found, as monitoring plugins do: 0 nothing or only what is good to know, 1 warnings,
2 something critical, 3 there was no looking.`,
		Example: "  cairn status\n  cairn status --exit-code >/dev/null || mail -s cairn admin\n  cairn status -o json | jq .evidence",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			var w *clusterView
			err := c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) (err error) {
				if w, err = s.cluster(ctx); w == nil {
					return err
				}
				if out.format != "table" {
					return errors.Join(out.show(w, nil, nil), err)
				}
				return errors.Join(printStatus(w), err)
			})
			if exit {
				return exitAs{err, w.exitCode()}
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&exit, "exit-code", false, "exit with what was found: 1 warnings, 2 critical, 3 not known")
	out.register(cmd)
	return cmd
}

// exitCode is what `cairn status --exit-code` ends with; nil: nothing was seen.
func (w *clusterView) exitCode() int {
	if w == nil {
		return 3
	}
	worst := 0
	for _, f := range w.Evidence {
		worst = max(worst, rank(f.Severity))
	}
	return worst
}

// noteBad says of each copy how many of its blocks cannot be read now.
func (w *volumeView) noteBad(id uint64, said map[string]*pb.HostStatusReply) {
	for i := range w.Members {
		m := &w.Members[i]
		for _, b := range said[m.Host].GetBad() {
			if b.VolumeId == id && fmt.Sprintf("%x", b.Store) == m.Store {
				m.BadBlocks = b.Blocks
			}
		}
	}
}

func printStatus(w *clusterView) error {
	if len(w.Problems) == 0 {
		fmt.Println("healthy")
	}
	for _, f := range w.Evidence {
		f.print()
	}
	fmt.Println()
	if err := printTable(metaTable(w.Meta)); err != nil {
		return err
	}
	fmt.Println()
	var hosts [][]string
	for _, h := range w.Hosts {
		for _, s := range h.Stores {
			if s.Retired && s.State == "down" && len(w.copiesOn(s.ID)) == 0 {
				continue // gone for good
			}
			hosts = append(hosts, []string{h.Name, seen(h), s.ID[:8], formatSize(s.Used), formatSize(s.Live), formatSize(s.Capacity), s.is()})
		}
	}
	if len(hosts) == 0 {
		return nil
	}
	if err := printTable([]string{"HOST", "IS", "STORE", "USED", "LIVE", "CAPACITY", "STATE"}, hosts); err != nil {
		return err
	}
	if len(w.Volumes) == 0 {
		return nil
	}
	fmt.Println()
	var vols [][]string
	for _, v := range w.Volumes {
		vols = append(vols, []string{v.Name, formatSize(v.SizeBytes), formatSize(v.Allocated), v.State, dash(v.Holder)})
	}
	return printTable([]string{"VOLUME", "SIZE", "ALLOCATED", "STATE", "ATTACHED ON"}, vols)
}

func metaTable(ms []metaView) ([]string, [][]string) {
	var rows [][]string
	for _, m := range ms {
		rows = append(rows, []string{dash(m.Name), m.Addr, dash(m.Role), m.State, fmt.Sprint(m.Term), fmt.Sprint(m.Applied), m.StateHash, fmt.Sprint(m.Knows), fmt.Sprint(m.Uses)})
	}
	return []string{"META", "ADDRESS", "ROLE", "STATE", "TERM", "APPLIED", "STATE HASH", "KNOWS", "USES"}, rows
}

func metaListCommand(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Example: "  cairn meta ls",
		Use:     "ls", Short: "List the metadata nodes and who leads", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				ms := s.metaViews(ctx)
				header, rows := metaTable(ms)
				return out.show(ms, header, rows)
			})
		},
	}
	out.register(cmd)
	return cmd
}

func hostListCommand(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Example: "  cairn host ls\n  cairn host ls -o json",
		Use:     "ls", Short: "List the hosts", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				hs, err := s.hostViews(ctx)
				if err != nil {
					return err
				}
				var rows [][]string
				for _, h := range hs {
					rows = append(rows, []string{h.Name, seen(h), fmt.Sprint(len(h.Stores)), fmt.Sprint(h.CPUs), formatSize(h.Memory), h.Data, h.Control})
				}
				return out.show(hs, []string{"HOST", "IS", "STORES", "CPUS", "MEMORY", "DATA", "CONTROL"}, rows)
			})
		},
	}
	out.register(cmd)
	return cmd
}
