package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/netplane/agent"
	"github.com/cairnstore/cairn/netplane/bird"
	"github.com/cairnstore/cairn/netplane/link"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// networkConfig is the [network] section of a host's file.
type networkConfig struct {
	Topology string `toml:"topology"` // file with the whole network, the same on every host; "": routes are somebody else's
	Node     string `toml:"node"`     // this host's name in it; "": the host's
	DSCP     int    `toml:"dscp"`     // class of service of storage traffic, 0 to 63

	top   bird.Topology
	names []string // of the paths, as data lists them
}

// loadTopology reads a file with a network. Errors name the field.
func loadTopology(path string) (t bird.Topology, err error) {
	if err := loadFile(path, &t); err != nil {
		return t, err
	}
	if t, err = t.Normal(); err != nil {
		return t, status.Errorf(status.Invalid, "network file %s: %w", path, err)
	}
	for _, n := range t.Nodes { // what every node's kernel is to have must be possible, too
		if _, err := agent.Wanted(t, n.Name, nil); err != nil {
			return t, status.Errorf(status.Invalid, "network file %s: node %s: %w", path, n.Name, err)
		}
	}
	return t, nil
}

// checkNetwork loads the topology and makes ":PORT" of data the list of this
// host's addresses in it.
func (c *hostConfig) checkNetwork() (err error) {
	n := &c.Network
	if n.DSCP < 0 || n.DSCP > 63 {
		return fmt.Errorf("network.dscp: %d is not between 0 and 63", n.DSCP)
	}
	if n.Topology == "" {
		return nil
	}
	if n.Node == "" {
		n.Node = c.Name
	}
	if n.top, err = loadTopology(n.Topology); err != nil {
		return fmt.Errorf("network.topology: %w", err)
	}
	if node, ok := n.top.Node(n.Node); !ok || node.Spine {
		return fmt.Errorf("network.node: %q is not a host of %s", n.Node, n.Topology)
	}
	addrs, names := agent.Planes(n.top, n.Node)
	if port, ok := strings.CutPrefix(c.Data, ":"); ok {
		var list []string
		for _, a := range addrs {
			list = append(list, net.JoinHostPort(a.String(), port))
		}
		c.Data = strings.Join(list, ",")
	}
	for _, d := range link.SplitAddrs(c.Data) {
		name := ""
		if ap, err := netip.ParseAddrPort(d); err == nil {
			if i := slices.Index(addrs, ap.Addr()); i >= 0 {
				name = names[i]
			}
		}
		if name == "" {
			return fmt.Errorf("data: %s is not an address of %s in %s: storage traffic would leave the storage network", d, n.Node, n.Topology)
		}
		n.names = append(n.names, name)
	}
	return nil
}

// startNetwork brings up this host's part of the storage network, if it is ours
// to do, and begins to keep account of the paths to other hosts. A plane's
// connections leave from the plane's own address.
func (h *hostd) startNetwork() (err error) {
	n := h.cfg.Network
	if n.Topology != "" {
		if h.net, err = agent.Start(agent.Config{Dir: filepath.Join(h.cfg.Dir, "network"), Topology: n.top, Node: n.Node, Log: h.log}); err != nil {
			return fmt.Errorf("storage network: %w", err)
		}
		h.undo = append(h.undo, h.net.Close)
	}
	cfg := link.PathsConfig{Log: h.log, Names: n.names}
	if h.net != nil {
		cfg.Observe = func(s link.PathState) {
			was := "works again"
			if !s.Alive {
				was = "is dead"
			}
			h.net.Note(fmt.Sprintf("path %s to %s %s", s.Name, s.Remote, was), "")
		}
	}
	if own := link.SplitAddrs(h.cfg.Data); len(own) > 1 {
		for _, a := range own {
			ap, err := netip.ParseAddrPort(a)
			if err != nil { // a name: the kernel chooses for all
				cfg.Locals = nil
				break
			}
			cfg.Locals = append(cfg.Locals, ap.Addr())
		}
	}
	h.paths = link.NewPaths(cfg)
	h.undo = append(h.undo, h.paths.Close)
	return nil
}

const (
	peersEvery = 5 * time.Second
	maxPeers   = 64 // probed without being dialed
)

// watchPeers probes the paths to other hosts before anybody needs them: a dial
// then knows the best one, and `cairn status` which are dead.
func (h *hostd) watchPeers(ctx context.Context) {
	if len(link.SplitAddrs(h.cfg.Data)) < 2 {
		return // there is one path
	}
	t := time.NewTicker(peersEvery)
	defer t.Stop()
	for {
		if rep, err := h.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Hosts{Hosts: true}}); err == nil {
			for i, o := range rep.Hosts {
				if i < maxPeers && o.Host.Name != h.cfg.Name {
					h.paths.Watch(o.Host.DataAddr)
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// netReport is what one host says of its network.
type netReport struct {
	Host    string           `json:"host"`
	Network *agent.Report    `json:"network"` // null: the host's routes are not cairn's
	Paths   []link.PathState `json:"paths"`
}

// NetReport implements pb.HostControlServer.
func (c *control) NetReport(context.Context, *pb.NetRequest) (*pb.NetReply, error) {
	rep := netReport{Host: c.h.cfg.Name, Paths: []link.PathState{}}
	rep.Paths = append(rep.Paths, c.h.paths.States()...)
	if c.h.net != nil {
		r, err := c.h.net.Report()
		if err != nil {
			c.h.log.Warn("network only partly known", "err", err)
		}
		rep.Network = &r
	}
	return netReply(rep, nil), nil
}

// NetEvents implements pb.HostControlServer.
func (c *control) NetEvents(_ context.Context, r *pb.NetRequest) (*pb.NetReply, error) {
	if c.h.net == nil {
		return netReply(nil, c.noNetwork()), nil
	}
	return netReply(c.h.net.Events(r.After), nil), nil
}

func (c *control) noNetwork() error {
	return status.Errorf(status.Unsupported, "host %s does not manage its network: give its file a [network] section", c.h.cfg.Name)
}

// AddRoute implements pb.HostControlServer.
func (c *control) AddRoute(_ context.Context, r *pb.RouteRequest) (*pb.HostReply, error) {
	if c.h.net == nil {
		return reply(c.noNetwork()), nil
	}
	route, err := agent.ParseRoute([]string{r.Route})
	if err == nil {
		err = c.h.net.AddRoute(route)
	}
	return reply(err), nil
}

// RemoveRoute implements pb.HostControlServer.
func (c *control) RemoveRoute(_ context.Context, r *pb.RouteRequest) (*pb.HostReply, error) {
	if c.h.net == nil {
		return reply(c.noNetwork()), nil
	}
	to, err := agent.ParseDestination(r.Route)
	if err == nil {
		err = c.h.net.RemoveRoute(to)
	}
	return reply(err), nil
}

func netReply(v any, err error) *pb.NetReply {
	if err != nil {
		return &pb.NetReply{Status: uint32(status.Of(err)), Detail: err.Error()}
	}
	b, err := json.Marshal(v)
	if err != nil {
		return &pb.NetReply{Status: uint32(status.Internal), Detail: err.Error()}
	}
	return &pb.NetReply{Json: b}
}

// netRunCommand keeps the network of a node that is no host of cairn's: a spine
// that is a Linux machine.
func netRunCommand() *cobra.Command {
	var topology, node, dir string
	cmd := &cobra.Command{
		Use:     "run --topology FILE --node NAME --state DIR",
		Short:   "Keep one node's part of the storage network until told to stop; a spine's, for `host run` does it for a host",
		Example: "  cairn net run --topology /etc/cairn/network.toml --node spine-1 --state /var/lib/cairn/network",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			t, err := loadTopology(topology)
			if err != nil {
				return err
			}
			a, err := agent.Start(agent.Config{Dir: dir, Topology: t, Node: node, Log: daemonLog("")})
			if err != nil {
				return err
			}
			fmt.Println("ready")
			<-cmd.Context().Done()
			return a.Close()
		},
	}
	cmd.Flags().StringVar(&topology, "topology", "", "file with the whole network")
	cmd.Flags().StringVar(&node, "node", "", "which of its nodes this is")
	cmd.Flags().StringVar(&dir, "state", "", "directory for what the node keeps")
	for _, f := range []string{"topology", "node", "state"} {
		must(cmd.MarkFlagRequired(f))
	}
	return cmd
}
