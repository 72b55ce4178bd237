package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
}

type hostView struct {
	Name       string      `json:"name"`
	Up         bool        `json:"up"`
	Drained    bool        `json:"drained"`
	LastSeenMs int64       `json:"lastSeenMs"`
	Data       string      `json:"dataAddr"`
	Control    string      `json:"controlAddr"`
	CPUs       uint32      `json:"cpus"`
	Memory     uint64      `json:"memoryBytes"`
	Stores     []storeView `json:"stores"`
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
		out = append(out, metaView{ID: n.Id, Name: n.Name, Role: n.Role, Addr: n.Addr, State: n.State, Leader: n.Leader, Term: n.Term, Applied: n.Applied,
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
		CPUs: h.Host.Cpus, Memory: h.Host.MemoryBytes, Stores: []storeView{}}
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

// cluster gathers everything `cairn status` shows.
func (s *session) cluster(ctx context.Context) (*clusterView, error) {
	w := &clusterView{Problems: []string{}, Evidence: []finding{}, Hosts: []hostView{}, Tenants: []tenantView{}, Volumes: []volumeView{}, Meta: s.metaViews(ctx)}
	rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volumes{Volumes: true}})
	if err != nil {
		w.find(noMetadata(err))
		return w, err
	}
	w.Cluster = rep.ClusterId
	if w.Hosts, err = s.hostViews(ctx); err != nil {
		return nil, err
	}
	for _, v := range rep.Volumes {
		w.Volumes = append(w.Volumes, viewVolume(v))
	}
	if w.Tenants, err = s.tenants(ctx); err != nil {
		return nil, err
	}
	w.find(health(w, time.Now())...)
	network, err := s.netView(ctx)
	if err != nil {
		return nil, err
	}
	for _, p := range network.Problems {
		w.Problems = append(w.Problems, p)
		w.Evidence = append(w.Evidence, finding{Severity: warning, What: p})
	}
	return w, nil
}

func statusCommand(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use: "status", Short: "What the cluster is, and what is wrong with it", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				w, err := s.cluster(ctx)
				if w == nil {
					return err
				}
				if out.format != "table" {
					return errors.Join(out.show(w, nil, nil), err)
				}
				return errors.Join(printStatus(w), err)
			})
		},
	}
	out.register(cmd)
	return cmd
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
			hosts = append(hosts, []string{h.Name, seen(h), s.ID[:8], formatSize(s.Used), formatSize(s.Live), formatSize(s.Capacity), s.State})
		}
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
		Use: "ls", Short: "List the metadata nodes and who leads", Args: cobra.NoArgs,
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
		Use: "ls", Short: "List the hosts", Args: cobra.NoArgs,
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
