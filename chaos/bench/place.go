package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/cairnstore/cairn/chaos/check"
	"github.com/cairnstore/cairn/chaos/cluster"
	"github.com/cairnstore/cairn/chaos/fault"
	"github.com/cairnstore/cairn/chaos/place"
	metaclient "github.com/cairnstore/cairn/meta/client"
	"github.com/cairnstore/cairn/placement"
	"github.com/cairnstore/cairn/proto/pb"
)

// PlaceConfig says what to measure of placement.
type PlaceConfig struct {
	Bin   string
	Out   io.Writer
	Talk  io.Writer
	JSON  bool
	Reads int // of each end-to-end round (4,000)
	Hosts int // of the fleet that decisions are timed on (10,000)
}

// PlaceResult is what `cairn bench place -o json` prints.
type PlaceResult struct {
	Hosts            int     `json:"hosts"`
	SampledP50Us     float64 `json:"sampledP50Us"`
	SampledP99Us     float64 `json:"sampledP99Us"`
	SampledPerSecond float64 `json:"sampledPerSecond"`
	FullP50Us        float64 `json:"fullP50Us"`
	FullP99Us        float64 `json:"fullP99Us"`
	SampledCPUUs     float64 `json:"sampledCpuUs"` // processor time of one decision
	FullCPUUs        float64 `json:"fullCpuUs"`

	Local  ReadFigures `json:"local"`  // the VM where placement put it
	Remote ReadFigures `json:"remote"` // on a host without its data
	Far    ReadFigures `json:"far"`    // the same, behind a delay of 1 ms each way
}

// ReadFigures are those of 4 KiB random reads at depth 1.
type ReadFigures struct {
	Host       string  `json:"host"`
	LocalShare float64 `json:"localShare"`
	P50Us      float64 `json:"p50Us"`
	P99Us      float64 `json:"p99Us"`
}

// Place measures decisions on a large fleet and reads on a cluster of real
// processes.
func Place(ctx context.Context, cfg PlaceConfig) error {
	if cfg.Reads == 0 {
		cfg.Reads = 4000
	}
	if cfg.Hosts == 0 {
		cfg.Hosts = 10_000
	}
	r := &PlaceResult{Hosts: cfg.Hosts}
	if err := r.decisions(cfg); err != nil {
		return err
	}
	if err := r.EndToEnd(ctx, cfg); err != nil {
		return err
	}
	return r.print(cfg)
}

// decisions times one scheduler on a fleet filled to 90 %.
func (r *PlaceResult) decisions(cfg PlaceConfig) error {
	t, err := place.Synthetic("fill-0.90", cfg.Hosts, 1)
	if err != nil {
		return err
	}
	f := placement.NewFleet()
	for _, h := range t.Hosts {
		if _, err := f.Add(placement.Machine{Name: h.Name, Up: true, Capacity: placement.Amounts{placement.CPU: h.CPU, placement.Memory: h.Memory}}); err != nil {
			return err
		}
	}
	s := placement.NewScheduler(f, placement.NearData, placement.SampleHosts, 1)
	var jobs []*placement.Job
	for _, e := range t.Events {
		if e.Kind != place.Arrive {
			continue
		}
		j := e.Job()
		if _, _, err := s.Place(j); err != nil {
			return err
		}
		jobs = append(jobs, j)
	}
	fmt.Fprintf(cfg.Talk, "deciding on %d hosts with %d VMs\n", f.Len(), len(jobs))
	sampled, cpu := timed(20_000, jobs, s)
	full, fullCPU := timed(400, jobs, placement.NewScheduler(f, placement.NearData, 0, 1))
	r.SampledCPUUs, r.FullCPUUs = cpu, fullCPU
	r.SampledP50Us, r.SampledP99Us, r.SampledPerSecond = at(sampled, 50), at(sampled, 99), 1e6/mean(sampled)
	r.FullP50Us, r.FullP99Us = at(full, 50), at(full, 99)
	return nil
}

// timed returns the times of n decisions, sorted, and the mean of their processor
// time, which other work on the machine does not change as much.
func timed(n int, jobs []*placement.Job, s *placement.Scheduler) (us []float64, cpuUs float64) {
	began := processorTime()
	for i := range n {
		j := jobs[i*7919%len(jobs)]
		t0 := time.Now()
		s.Decide(j)
		us = append(us, float64(time.Since(t0).Nanoseconds())/1000)
	}
	cpuUs = float64((processorTime() - began).Nanoseconds()) / 1000 / float64(n)
	slices.Sort(us)
	return us, cpuUs
}

// processorTime is what this process has used.
func processorTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts); err != nil {
		panic("CLOCK_PROCESS_CPUTIME_ID: " + err.Error()) // every Linux has it
	}
	return time.Duration(ts.Nano())
}

// at is a percentile of sorted values.
func at(sorted []float64, pct int) float64 { return sorted[min(len(sorted)*pct/100, len(sorted)-1)] }

func mean(v []float64) (sum float64) {
	for _, x := range v {
		sum += x
	}
	return sum / float64(len(v))
}

// The end-to-end volume: two replicas on four hosts, so that two have none.
const (
	placeVM     = "guest"
	placeBytes  = 64 << 20
	placeDelay  = time.Millisecond
	placeWriter = "host-1"
)

// EndToEnd starts a cluster of real processes, lets it place a VM whose volume
// has data, and reads that volume on the VM's host, on a host without the data,
// and there behind a delay.
func (r *PlaceResult) EndToEnd(ctx context.Context, cfg PlaceConfig) (err error) {
	fmt.Fprintln(cfg.Talk, "starting a cluster of four hosts")
	c, err := cluster.Start(ctx, cluster.Config{Bin: cfg.Bin, Hosts: 4})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if err := c.CreateVolume(ctx, volumeName, placeBytes, 2); err != nil {
		return err
	}
	if err := fillVolume(ctx, c); err != nil {
		return err
	}
	host, err := placeGuest(ctx, c)
	if err != nil {
		return err
	}
	if r.Local, err = readsOn(ctx, c, host, cfg.Reads); err != nil {
		return err
	}
	if _, err := c.Cairn(ctx, "vm", "stop", placeVM, "--force"); err != nil {
		return err
	}
	away, members, err := dataless(ctx, c)
	if err != nil {
		return err
	}
	if r.Remote, err = readsOn(ctx, c, away, cfg.Reads); err != nil {
		return err
	}
	if err := c.Detach(ctx, volumeName); err != nil {
		return err
	}
	undo, err := delayHosts(ctx, c, members)
	defer func() { err = errors.Join(err, undo()) }()
	if err != nil {
		return err
	}
	if r.Far, err = readsOn(ctx, c, away, cfg.Reads); err != nil {
		return err
	}
	return c.Detach(ctx, volumeName)
}

func fillVolume(ctx context.Context, c *cluster.Cluster) error {
	uri, err := c.Attach(ctx, volumeName, placeWriter)
	if err != nil {
		return err
	}
	dev, err := check.NBD(uri, nil)(ctx)
	if err != nil {
		return err
	}
	b := make([]byte, 1<<20)
	for off := int64(0); off < placeBytes && err == nil; off += int64(len(b)) {
		for i := range b {
			b[i] = byte(rand.Uint32())
		}
		_, err = dev.WriteAt(b, off)
	}
	if err = errors.Join(err, dev.Flush(), dev.Close()); err != nil {
		return err
	}
	return c.Detach(ctx, volumeName)
}

// placeGuest lets the cluster choose a VM's host.
func placeGuest(ctx context.Context, c *cluster.Cluster) (string, error) {
	if _, err := c.Cairn(ctx, "vm", "create", placeVM, "--volume", volumeName, "--memory", "64M"); err != nil {
		return "", err
	}
	if _, err := c.Cairn(ctx, "vm", "start", placeVM); err != nil {
		return "", err
	}
	out, err := c.Cairn(ctx, "vm", "show", placeVM, "-o", "json")
	if err != nil {
		return "", err
	}
	var vm struct {
		Host string `json:"host"`
	}
	return vm.Host, json.Unmarshal([]byte(out), &vm)
}

// dataless is a host without a replica, and the hosts that have one.
func dataless(ctx context.Context, c *cluster.Cluster) (away string, members []string, err error) {
	v, err := c.ShowVolume(ctx, volumeName)
	if err != nil {
		return "", nil, err
	}
	for _, m := range v.Members {
		members = append(members, m.Host)
	}
	for _, h := range c.Names(fault.KindHost) {
		if !slices.Contains(members, h) {
			return h, members, nil
		}
	}
	return "", nil, errors.New("every host has a replica")
}

// readsOn attaches the volume on a host, if it is not there, and reads.
func readsOn(ctx context.Context, c *cluster.Cluster, host string, n int) (f ReadFigures, err error) {
	uri, err := c.Attach(ctx, volumeName, host)
	if err != nil {
		return f, err
	}
	before, beforeLocal, err := readCounts(ctx, c, host)
	if err != nil {
		return f, err
	}
	dev, err := check.NBD(uri, nil)(ctx)
	if err != nil {
		return f, err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	b, us := make([]byte, 4096), make([]float64, 0, n)
	for range n {
		t0 := time.Now()
		if _, err := dev.ReadAt(b, rand.Int64N(placeBytes/4096)*4096); err != nil {
			return f, err
		}
		us = append(us, float64(time.Since(t0).Nanoseconds())/1000)
	}
	slices.Sort(us)
	after, afterLocal, err := readCounts(ctx, c, host)
	if err != nil {
		return f, err
	}
	if after-before < uint64(n) {
		return f, fmt.Errorf("%d reads were made on %s, and its gateway counts %d", n, host, after-before)
	}
	return ReadFigures{Host: host, LocalShare: float64(afterLocal-beforeLocal) / float64(after-before), P50Us: at(us, 50), P99Us: at(us, 99)}, nil
}

// state asks the metadata of a cluster for its hosts.
func state(ctx context.Context, c *cluster.Cluster, use func(*metaclient.Client, []*pb.HostState) error) (err error) {
	nodes, err := c.MetaNodes(ctx)
	if err != nil {
		return err
	}
	var addrs []string
	for _, n := range nodes {
		addrs = append(addrs, n.Addr)
	}
	m := metaclient.New(metaclient.Config{Addrs: addrs, Who: "bench"})
	defer func() { err = errors.Join(err, m.Close()) }()
	rep, err := m.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Hosts{Hosts: true}})
	if err != nil {
		return err
	}
	return use(m, rep.Hosts)
}

// readCounts are a gateway's counts of blocks read, and of those its own replica
// served.
func readCounts(ctx context.Context, c *cluster.Cluster, host string) (blocks, local uint64, err error) {
	err = state(ctx, c, func(_ *metaclient.Client, hosts []*pb.HostState) (err error) {
		for _, h := range hosts {
			if h.Host.Name != host {
				continue
			}
			conn, err := grpc.NewClient("passthrough:///"+h.Host.ControlAddr, grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				return err
			}
			st, err := pb.NewHostControlClient(conn).HostStatus(ctx, &pb.HostStatusRequest{})
			if err = errors.Join(err, conn.Close()); err != nil {
				return err
			}
			for _, a := range st.Attachments {
				blocks, local = blocks+a.ReadBlocks, local+a.LocalBlocks
			}
		}
		return nil
	})
	return blocks, local, err
}

// delayHosts puts a delay before the chunk servers of hosts: metadata is told
// another address of them.
func delayHosts(ctx context.Context, c *cluster.Cluster, names []string) (undo func() error, err error) {
	var proxies []*fault.Delay
	undo = func() (err error) {
		for _, p := range proxies {
			err = errors.Join(err, p.Close())
		}
		return err
	}
	return undo, state(ctx, c, func(m *metaclient.Client, hosts []*pb.HostState) error {
		for _, h := range hosts {
			if !slices.Contains(names, h.Host.Name) {
				continue
			}
			first, _, _ := strings.Cut(h.Host.DataAddr, ",")
			p, err := fault.NewDelay(first, placeDelay)
			if err != nil {
				return err
			}
			proxies = append(proxies, p)
			h.Host.DataAddr = p.Addr()
			if _, err := m.Do(ctx, &pb.Command{Op: &pb.Command_RegisterHost{RegisterHost: &pb.RegisterHost{Host: h.Host}}}); err != nil {
				return err
			}
		}
		return nil
	})
}

func (r *PlaceResult) print(cfg PlaceConfig) error {
	if cfg.JSON {
		enc := json.NewEncoder(cfg.Out)
		enc.SetIndent("", "  ")
		return enc.Encode(r)
	}
	_, err := fmt.Fprintf(cfg.Out, `decisions on %d hosts, filled to 90 %%
  sampled    p50 %6.1f µs   p99 %6.1f µs   CPU %6.1f µs   %8.0f a second   target p99 ≤ 50 µs and ≥ 50,000 a second: %s
  full scan  p50 %6.1f µs   p99 %6.1f µs   CPU %6.1f µs                     target p99 ≤ 5,000 µs: %s

4 KiB reads at depth 1, four hosts as real processes, two replicas
  where placement put the VM (%s)     %5.1f %% local   p50 %6.0f µs   p99 %6.0f µs   target ≥ 95 %% local: %s
  on a host without its data (%s)     %5.1f %% local   p50 %6.0f µs   p99 %6.0f µs   local p99 is %.2f × this, target ≤ 0.8: %s
  there, 1 ms away                        %5.1f %% local   p50 %6.0f µs   p99 %6.0f µs   local p99 is %.2f × this, target ≤ 0.5: %s
`, r.Hosts, r.SampledP50Us, r.SampledP99Us, r.SampledCPUUs, r.SampledPerSecond, met(r.SampledP99Us <= 50 && r.SampledPerSecond >= 50_000),
		r.FullP50Us, r.FullP99Us, r.FullCPUUs, met(r.FullP99Us <= 5000),
		r.Local.Host, 100*r.Local.LocalShare, r.Local.P50Us, r.Local.P99Us, met(r.Local.LocalShare >= 0.95),
		r.Remote.Host, 100*r.Remote.LocalShare, r.Remote.P50Us, r.Remote.P99Us, r.Local.P99Us/r.Remote.P99Us, met(r.Local.P99Us <= 0.8*r.Remote.P99Us),
		100*r.Far.LocalShare, r.Far.P50Us, r.Far.P99Us, r.Local.P99Us/r.Far.P99Us, met(r.Local.P99Us <= 0.5*r.Far.P99Us))
	return err
}
