package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/cairnstore/cairn/chunk/client"
	"github.com/cairnstore/cairn/chunk/gateway"
	chunkserver "github.com/cairnstore/cairn/chunk/server"
	metaclient "github.com/cairnstore/cairn/meta/client"
	nbdserver "github.com/cairnstore/cairn/nbd/server"
	agentnet "github.com/cairnstore/cairn/netplane/agent"
	"github.com/cairnstore/cairn/netplane/link"
	"github.com/cairnstore/cairn/placement/driver"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/vmhook/agent"
)

const (
	sweepPause = time.Second // removals that come together are swept together
	sweepRetry = 5 * time.Second
	closeWait  = 20 * time.Second
	chunksWait = 2 * time.Second
)

// hostd is one running host: stores and chunk server, gateway and NBD server,
// VM launcher, control service.
type hostd struct {
	cfg     *hostConfig
	log     *slog.Logger
	lock    *os.File
	meta    *metaclient.Client
	stores  []*hostStore
	chunks  *chunkserver.Server
	gw      *gateway.Gateway
	net     *agentnet.Agent // nil: this host's routes are not ours
	paths   *link.Paths
	nbd     *nbdserver.Server
	vms     *agent.Agent
	keeper  *driver.Keeper
	moves   *moves
	grpc    *grpc.Server
	gone    chan struct{}  // sweep has something to do
	adopted chan struct{}  // closed when VMs of the last process are known again
	undo    []func() error // what close has to do, last first
}

// gcPercent lets a host's heap grow to five times what lives on it, some tens of
// MiB: buffers of requests come and go faster than anything else, and at Go's
// default half of a read's CPU is spent collecting them.
const gcPercent = 400

// startHost brings a host up. It returns once the host is registered and
// serves; volumes it held before are attached again in the background.
func startHost(ctx context.Context, cfg *hostConfig, log *slog.Logger) (h *hostd, err error) {
	debug.SetGCPercent(gcPercent)
	h = &hostd{cfg: cfg, log: log.With("host", cfg.Name), adopted: make(chan struct{}), gone: make(chan struct{}, 1), moves: newMoves()}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.close())
		}
	}()
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		return h, fmt.Errorf("cannot make the host's directory: %w", err)
	}
	if h.lock, err = lockFile(filepath.Join(cfg.Dir, "lock")); err != nil {
		return h, err
	}
	h.undo = append(h.undo, h.lock.Close)
	if err := h.startNetwork(); err != nil {
		return h, err
	}
	if err := h.openStores(); err != nil {
		return h, err
	}
	h.meta = metaclient.New(metaclient.Config{Addrs: cfg.Meta, Who: cfg.Name})
	h.undo = append(h.undo, h.meta.Close)
	dataL, err := listenPatiently(link.Config{Addr: cfg.Data, Echo: len(link.SplitAddrs(cfg.Data)) > 1, DSCP: cfg.Network.DSCP})
	if err != nil {
		return h, err
	}
	if err := h.identify(ctx); err != nil {
		return h, errors.Join(err, dataL.Close())
	}
	if err := h.serveChunks(dataL); err != nil {
		return h, err
	}
	if err := h.register(ctx); err != nil {
		return h, err
	}
	if err := h.startGateway(); err != nil {
		return h, err
	}
	return h, h.serveControl(ctx)
}

func (h *hostd) serveChunks(l net.Listener) error {
	sc := chunkserver.Config{Cluster: h.cfg.Cluster, Log: h.log}
	for _, s := range h.stores {
		sc.Stores = append(sc.Stores, s)
	}
	h.chunks = chunkserver.New(sc)
	h.undo = append(h.undo, h.closeChunks)
	h.background(h.stepStores) // compaction and the like
	go h.served("chunk server", func() error { return h.chunks.Serve(l) })
	return nil
}

// closeChunks gives other hosts' gateways a moment to let go first: when a whole
// cluster stops at once, none of them then loses a replica on its way out.
func (h *hostd) closeChunks() error {
	t := time.NewTicker(5 * time.Millisecond)
	defer t.Stop()
	for end := time.Now().Add(chunksWait); h.chunks.Conns() > 0 && time.Now().Before(end); {
		<-t.C
	}
	return h.chunks.Close()
}

// served logs why a server that should serve for ever has stopped.
func (h *hostd) served(what string, serve func() error) {
	if err := serve(); err != nil && !errors.Is(err, net.ErrClosed) {
		h.log.Error(what+" stopped", "err", err)
	}
}

// background runs f until the host closes.
func (h *hostd) background(f func(ctx context.Context)) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); f(ctx) }()
	h.undo = append(h.undo, func() error { cancel(); <-done; return nil })
}

// register tells metadata who this host is and which stores it has. A cluster
// without an identity gets the configured one.
func (h *hostd) register(ctx context.Context) error {
	_, err := h.meta.Do(ctx, &pb.Command{Op: &pb.Command_InitCluster{InitCluster: &pb.InitCluster{ClusterId: h.cfg.Cluster}}})
	if err != nil && status.Of(err) != status.Exists {
		return err
	}
	q, err := h.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Cluster{Cluster: true}})
	if err != nil {
		return err
	}
	if q.ClusterId != h.cfg.Cluster {
		return status.Errorf(status.Conflict, "host %s is configured for cluster %s and its metadata nodes belong to cluster %s: correct one of them", h.cfg.Name, h.cfg.Cluster, q.ClusterId)
	}
	labels := map[string]string{"host": h.cfg.Name}
	for k, v := range h.cfg.Labels {
		labels[k] = v
	}
	host := &pb.Host{Name: h.cfg.Name, DataAddr: h.cfg.Data, ControlAddr: h.cfg.Control, Labels: labels,
		Cpus: uint32(h.cfg.CPUs), MemoryBytes: h.cfg.memory, Promise: h.cfg.promise()}
	if host.Cpus == 0 {
		host.Cpus = uint32(runtime.NumCPU())
	}
	if host.MemoryBytes == 0 {
		var si unix.Sysinfo_t
		if err := unix.Sysinfo(&si); err != nil {
			return fmt.Errorf("cannot tell this machine's memory: %w", err)
		}
		host.MemoryBytes = uint64(si.Totalram) * uint64(si.Unit)
	}
	if _, err := h.meta.Do(ctx, &pb.Command{Op: &pb.Command_RegisterHost{RegisterHost: &pb.RegisterHost{Host: host, JoinToken: h.cfg.JoinToken}}}); err != nil {
		return err
	}
	return h.registerStores(ctx)
}

func (h *hostd) startGateway() error {
	local := map[ids.StoreID]client.Submitter{}
	for _, s := range h.stores {
		local[s.ID()] = s
	}
	h.keeper = driver.NewKeeper(driver.KeeperConfig{Host: h.cfg.Name, Machines: keptVMs{h}, Mover: mover{h}, Meta: h.meta, Log: h.log})
	h.gw = gateway.New(gateway.Config{Host: h.cfg.Name, Cluster: h.cfg.Cluster, Meta: h.meta, Local: local, Usage: h.usage, Resized: h.resized, Say: h.say, Heard: h.keeper.Heard, Dialer: link.Dialer{Paths: h.paths, DSCP: h.cfg.Network.DSCP},
		Gone: func(name string) { h.nbd.Drop(name) }, Grace: h.cfg.replaceAfter, Alone: true, Log: h.log})
	return h.serveNBD()
}

// usage is what the heartbeat says of the stores.
func (h *hostd) usage() []*pb.StoreUsage {
	var out []*pb.StoreUsage
	for _, s := range h.stores {
		u, id := s.Usage(), s.ID()
		out = append(out, &pb.StoreUsage{Store: id[:], CapacityBytes: u.CapacityBytes, UsedBytes: u.UsedBytes, LiveBytes: u.LiveBytes, State: u.State})
	}
	return out
}

func (h *hostd) serveControl(ctx context.Context) error {
	l, err := listenPatiently(link.Config{Addr: h.cfg.Control})
	if err != nil {
		return err
	}
	h.vms = agent.New(agent.Config{Dir: filepath.Join(h.cfg.Dir, "vm"), Volumes: vmVolumes{h}, Log: h.log, OnExit: h.vmEnded, Listen: h.listenMemory, Dial: h.dialMemory})
	h.grpc = grpc.NewServer()
	pb.RegisterHostControlServer(h.grpc, &control{h: h})
	h.undo = append(h.undo, func() error { h.vms.Close(); return nil }, func() error { h.grpc.Stop(); return nil })
	go h.served("control service", func() error { return h.grpc.Serve(l) })
	h.background(func(ctx context.Context) {
		if err := h.gw.Recover(ctx); err != nil && ctx.Err() == nil {
			h.log.Error("volumes not attached again", "err", err)
		}
	})
	if h.cfg.Metrics != "" {
		m, err := serveMetrics(h.cfg.Metrics, hostMetrics(h), h.log)
		if err != nil {
			return err
		}
		h.undo = append(h.undo, m.close)
	}
	h.background(h.adopt)
	h.background(h.keeper.Run)
	h.background(h.sweep)
	h.background(h.watchPeers)
	h.background(h.watch)
	h.background(h.tellErrors)
	return nil
}

// adopt finds the VMs that outlived this host's last process, and lets them see
// what has grown meanwhile.
func (h *hostd) adopt(ctx context.Context) {
	defer close(h.adopted)
	found, err := h.vms.Adopt(ctx)
	if err != nil && ctx.Err() == nil {
		h.log.Error("VMs not found again", "err", err)
	}
	if len(found) == 0 {
		return
	}
	h.log.Info("VMs found running", "vms", found)
	for _, v := range h.gw.Volumes() {
		if err := h.vms.Refresh(ctx, v.Name(), v.Size()); err != nil && ctx.Err() == nil {
			h.log.Warn("VMs may not see the size of a volume", "volume", v.Name(), "err", err)
		}
	}
}

// sweep drops what the stores hold of volumes that no longer exist. Ids are
// never used again, so a volume metadata does not know is gone for good. It
// looks when it begins and when the watch has heard of a removal.
func (h *hostd) sweep(ctx context.Context) {
	for {
		again := false
		for _, s := range h.stores {
			err := sweepStore(ctx, h.meta, s)
			if err == nil {
				err = sweepWaste(ctx, h.meta, s)
			}
			if err == nil {
				err = sweepLayers(ctx, h.meta, s)
			}
			if err != nil && ctx.Err() == nil {
				h.log.Warn("removed volumes not swept", "store", s.ID().Short(), "err", err)
				again = true
			}
		}
		if again {
			pause(ctx, sweepRetry)
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-h.gone:
		}
		pause(ctx, sweepPause)
	}
}

// holds reports whether a store here has data of a volume.
func (h *hostd) holds(id ids.VolumeID) bool {
	for _, s := range h.stores {
		if s.Holds(id) {
			return true
		}
	}
	return false
}

// removed makes sweep look again.
func (h *hostd) removed() {
	select {
	case h.gone <- struct{}{}:
	default:
	}
}

// watch follows what changes in metadata: sizes, members and limits of the
// volumes attached here, and removals.
func (h *hostd) watch(ctx context.Context) {
	err := h.meta.Watch(ctx, 0, func(rep *pb.WatchReply) error {
		if rep.Resync {
			h.gw.Changed(ctx, 0)
			h.removed()
		}
		for _, c := range rep.Changes {
			id, is := c.What.(*pb.Change_Volume)
			switch {
			case is && c.Gone, h.hasStore(c.GetWaste()):
				h.removed()
			case is:
				h.gw.Changed(ctx, ids.VolumeID(id.Volume))
				if h.holds(ids.VolumeID(id.Volume)) { // perhaps a layer less
					h.removed()
				}
			}
		}
		return nil
	})
	if err != nil && ctx.Err() == nil {
		h.log.Error("metadata is not watched any more", "err", err)
	}
}

func (h *hostd) hasStore(id []byte) bool {
	for _, s := range h.stores {
		if own := s.ID(); len(id) > 0 && bytes.Equal(own[:], id) {
			return true
		}
	}
	return false
}

// resized lets a VM see its disk's new size.
func (h *hostd) resized(name string, size uint64) {
	ctx, cancel := context.WithTimeout(context.Background(), closeWait)
	defer cancel()
	if err := h.vms.Refresh(ctx, name, size); err != nil {
		h.log.Warn("VMs may not see the size of a volume", "volume", name, "err", err)
	}
}

// uri is the NBD URI of a volume attached here.
func (h *hostd) uri(volume string) string {
	return "nbd+unix:///" + volume + "?socket=" + h.cfg.NBD
}

// close undoes what was started, last first.
func (h *hostd) close() error {
	var errs []error
	for i := len(h.undo) - 1; i >= 0; i-- {
		errs = append(errs, ignoreClosed(h.undo[i]()))
	}
	h.undo = nil
	return errors.Join(errs...)
}

func hostCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{Use: "host", Short: "Hosts: chunk server, gateway and VM launcher"}
	var config string
	run := &cobra.Command{
		Use:     "run --config FILE",
		Short:   "Run one host until it is told to stop",
		Example: "  cairn host run --config /etc/cairn/host.toml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadHostConfig(config)
			if err != nil {
				return err
			}
			h, err := startHost(cmd.Context(), cfg, daemonLog(cfg.LogFormat))
			if err != nil {
				return err
			}
			fmt.Println("ready")
			<-cmd.Context().Done()
			return h.close()
		},
	}
	run.Flags().StringVar(&config, "config", "", "configuration file")
	must(run.MarkFlagRequired("config"))
	cmd.AddCommand(run, hostListCommand(c), hostShowCommand(c), hostDrainCommand(c), hostResumeCommand(c), hostRemoveCommand(c), hostTokenCommand(c))
	return cmd
}
