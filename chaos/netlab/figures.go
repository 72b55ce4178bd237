package netlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cairnstore/cairn/chaos/check"
	"github.com/cairnstore/cairn/netplane"
	"github.com/cairnstore/cairn/netplane/bird"
	"github.com/cairnstore/cairn/proto/status"
)

// The load under which everything is measured.
const (
	figureUDP    = 8
	figureTCP    = 4
	figureSpread = 64
	figureVolume = "v"
)

// settled is the quiet time before a cut: OSPF may describe a router's links
// only once in 5 s (MinLSInterval, RFC 2328), and a cut within that time of a
// healing is told so much later. cutFor is how long a cut lasts.
const (
	settled     = 3 * time.Second
	settledOSPF = 12 * time.Second // the description of a healing may itself be 5 s late
	cutFor      = 4 * time.Second
	idleFor     = 5 * time.Second
)

// MeasureConfig says what to measure.
type MeasureConfig struct {
	Bin      string // the cairn binary
	Dir      string // fresh; removed by the caller
	Protocol bird.Protocol
	NoBFD    bool
	Spines   int       // 0: 2
	Hosts    int       // 0: 4
	Talk     io.Writer // progress; nil: none
}

// Figures are what one protocol did. Times are in milliseconds.
type Figures struct {
	Protocol    bird.Protocol `json:"protocol"`
	BFD         bool          `json:"bfd"`
	ConvergedMs float64       `json:"convergedMs"` // from the start of all daemons
	Cuts        []CutFigure   `json:"cuts"`
	SpreadPct   float64       `json:"spreadPct"` // of 64 flows, over the first of the spines
	AddRouteMs  float64       `json:"addRouteMs"`
	LostByRoute int           `json:"lostByRoute"`  // UDP packets while an unrelated route came and went
	BirdRSS     uint64        `json:"birdRssBytes"` // of one host
	BirdCPUPct  float64       `json:"birdCpuPct"`
	HostCPUPct  float64       `json:"hostCpuPct"` // an idle host's whole cairn process, probes included
}

// CutFigure is what one cut did to everybody.
type CutFigure struct {
	Cut       string  `json:"cut"`
	UDPms     float64 `json:"udpMs"`     // longest silence of a flow
	TCPms     float64 `json:"tcpMs"`     // the same
	StorageMs float64 `json:"storageMs"` // longest operation of the guest-like load
	Errors    int     `json:"errors"`    // of that load
	Excluded  int     `json:"excluded"`  // changes of the volume's members
	HealedMs  float64 `json:"healedMs"`  // until every host has all next hops again
	HealUDPms float64 `json:"healUdpMs"` // longest silence of a flow meanwhile
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// Measure builds a lab with a cluster for one protocol and takes its figures.
func Measure(ctx context.Context, cfg MeasureConfig) (f Figures, err error) {
	if cfg.Spines == 0 {
		cfg.Spines = 2
	}
	if cfg.Hosts == 0 {
		cfg.Hosts = 4
	}
	if cfg.Talk == nil {
		cfg.Talk = io.Discard
	}
	f = Figures{Protocol: cfg.Protocol, BFD: !cfg.NoBFD && cfg.Protocol != bird.Static}
	if f.ConvergedMs, err = convergence(ctx, cfg); err != nil {
		return f, err
	}
	l, err := New(Config{Dir: filepath.Join(cfg.Dir, "lab"), Spines: cfg.Spines, Hosts: cfg.Hosts, Protocol: cfg.Protocol, NoBFD: cfg.NoBFD, Bare: true})
	if err != nil {
		return f, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	c, err := l.StartCluster(ctx, cfg.Bin)
	if err != nil {
		return f, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	wait, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, err := l.Converged(wait); err != nil {
		return f, err
	}
	m := &measurement{cfg: cfg, lab: l, c: c, f: &f}
	return f, m.run(ctx)
}

// convergence is the time from the first daemon's start to all next hops.
func convergence(ctx context.Context, cfg MeasureConfig) (float64, error) {
	began := time.Now()
	l, err := New(Config{Dir: filepath.Join(cfg.Dir, "converge"), Spines: cfg.Spines, Hosts: cfg.Hosts, Protocol: cfg.Protocol, NoBFD: cfg.NoBFD})
	if err != nil {
		return 0, err
	}
	wait, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	_, err = l.Converged(wait)
	took := time.Since(began)
	return ms(took), errors.Join(err, l.Close())
}

type measurement struct {
	cfg   MeasureConfig
	lab   *Lab
	c     *Cluster
	f     *Figures
	probe *Probe
	io    *check.Load
}

func (m *measurement) talk(format string, args ...any) {
	fmt.Fprintf(m.cfg.Talk, "%s: "+format+"\n", append([]any{m.cfg.Protocol}, args...)...)
}

func (m *measurement) run(ctx context.Context) (err error) {
	if err := m.idle(ctx); err != nil {
		return err
	}
	for _, args := range [][]string{{"volume", "create", figureVolume, "--size", "256M", "--replicas", "3"}, {"volume", "attach", figureVolume, "--host", "host-1"}} {
		if _, err := m.c.Cairn(ctx, args...); err != nil {
			return err
		}
	}
	m.io = check.NewLoad(check.Config{Dial: check.NBD("nbd+unix:///"+figureVolume+"?socket="+m.c.NBD(1), nil), Seed: 1, Blocks: 1024, Depth: 8, Rate: 1000})
	ioCtx, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- m.io.Run(ioCtx) }()
	defer func() { stop(); err = errors.Join(err, <-ended) }()
	if m.probe, err = m.lab.Probe(1, 2, figureUDP, figureTCP); err != nil {
		return err
	}
	defer func() {
		_, perr := m.probe.Stop()
		err = errors.Join(err, perr)
	}()
	for _, cut := range [][2]string{{"cut", "host-2:spine-1"}, {"cut", "host-1:spine-2"}, {"silence", "spine-1"}, {"silence", "spine-2"}, {"cut", "spine-1"}, {"drop-data", "spine-2"}} {
		c, err := m.cut(ctx, cut[0], cut[1])
		if err != nil {
			return err
		}
		m.f.Cuts = append(m.f.Cuts, c)
	}
	if err := m.unrelated(ctx); err != nil {
		return err
	}
	return m.spread(ctx)
}

// pause waits, unless ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (m *measurement) settle(ctx context.Context) error {
	if m.cfg.Protocol == bird.OSPF {
		return pause(ctx, settledOSPF)
	}
	return pause(ctx, settled)
}

// cut makes one cut under load and heals it.
func (m *measurement) cut(ctx context.Context, do, part string) (c CutFigure, err error) {
	c = CutFigure{Cut: do + " " + part}
	if err := m.settle(ctx); err != nil {
		return c, err
	}
	before, err := m.revision(ctx)
	if err != nil {
		return c, err
	}
	refused := m.refused()
	m.probe.Take()
	since := len(m.io.History().Ops())
	if err := m.lab.Do(do, part); err != nil {
		return c, err
	}
	if err := pause(ctx, cutFor); err != nil {
		return c, err
	}
	g := m.probe.Take()
	c.UDPms, c.TCPms = ms(g.UDP), ms(g.TCP)
	healed := time.Now()
	if err := m.lab.Do("heal", "all"); err != nil {
		return c, err
	}
	wait, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, err := m.lab.Converged(wait); err != nil {
		return c, err
	}
	c.HealedMs = ms(time.Since(healed))
	c.StorageMs, c.Errors = ms(slowest(m.io.History(), since)), m.refused()-refused
	// What came back right after the healing belongs to the cut: flows whose
	// silence ended with it.
	c.HealUDPms = ms(m.probe.Take().UDP)
	after, err := m.revision(ctx)
	c.Excluded = int(after - before)
	m.talk("%s: UDP %.0f ms, TCP %.0f ms, storage %.0f ms, %d errors, %d changes of members; all next hops again after %.0f ms",
		c.Cut, c.UDPms, c.TCPms, c.StorageMs, c.Errors, c.Excluded, c.HealedMs)
	return c, err
}

// slowest is the longest of the operations begun after the first n, those still
// under way included.
func slowest(h *check.History, n int) (d time.Duration) {
	for _, o := range h.Ops()[n:] {
		if !o.Unknown {
			d = max(d, time.Duration(o.ReturnNs-o.InvokeNs))
		}
	}
	return d
}

func (m *measurement) refused() (n int) {
	for _, k := range m.io.Stats().Kinds {
		n += k.Refused
	}
	return n
}

func (m *measurement) revision(ctx context.Context) (uint64, error) {
	v, err := m.c.volume(ctx, figureVolume)
	return v.Revision, err
}

// unrelated adds and removes a route to nobody while packets flow.
func (m *measurement) unrelated(ctx context.Context) error {
	if err := m.settle(ctx); err != nil {
		return err
	}
	if _, err := m.probe.Stop(); err != nil {
		return err
	}
	var err error
	if m.probe, err = m.lab.Probe(1, 2, figureUDP, figureTCP); err != nil {
		return err
	}
	began := time.Now()
	for range 3 {
		if _, err := m.c.Cairn(ctx, "route", "add", "--host", "host-1", "10.255.0.99", "via", m.lab.Topology.Cables[0].Ends[0].Spine.String(), "dev", "s1"); err != nil {
			return err
		}
		if m.f.AddRouteMs == 0 {
			m.f.AddRouteMs = ms(time.Since(began)) // the command's whole run
		}
		if has, err := m.lab.hasRoute("host-1", netip.MustParsePrefix("10.255.0.99/32")); err != nil || !has {
			return errors.Join(err, status.Errorf(status.Internal, "an added route is not in the kernel"))
		}
		if _, err := m.c.Cairn(ctx, "route", "rm", "--host", "host-1", "10.255.0.99"); err != nil {
			return err
		}
	}
	m.f.LostByRoute = m.probe.Lost()
	return nil
}

// spread counts over which spine the packets of many flows go.
func (m *measurement) spread(ctx context.Context) error {
	if _, err := m.probe.Stop(); err != nil {
		return err
	}
	p, err := m.lab.Probe(1, 2, figureSpread, 0)
	if err != nil {
		return err
	}
	m.probe = p
	if err := m.countSpread(); err != nil {
		return err
	}
	first, err := m.passed()
	if err != nil {
		return err
	}
	if err := pause(ctx, 2*time.Second); err != nil {
		return err
	}
	then, err := m.passed()
	if err != nil {
		return err
	}
	all := 0
	for i := range then {
		all += then[i] - first[i]
	}
	m.f.SpreadPct = 100 * float64(then[0]-first[0]) / float64(max(1, all))
	m.talk("64 flows: %.0f %% over spine-1", m.f.SpreadPct)
	return nil
}

// passed is how many packets of probes host-1 has sent to each spine. Storage
// traffic chooses its paths itself, and is not counted.
func (m *measurement) passed() (out []int, err error) {
	err = m.lab.In("host-1", func() error {
		text, err := exec.Command("/usr/sbin/nft", "list", "chain", "inet", "spread", "out").CombinedOutput()
		if err != nil {
			return fmt.Errorf("nft on host-1: %s: %w", strings.TrimSpace(string(text)), err)
		}
		for _, c := range counted.FindAllSubmatch(text, -1) {
			n, err := strconv.Atoi(string(c[1]))
			if err != nil {
				return err
			}
			out = append(out, n)
		}
		return nil
	})
	if err == nil && len(out) != m.cfg.Spines {
		err = status.Errorf(status.Internal, "nft on host-1 has %d counters for %d spines", len(out), m.cfg.Spines)
	}
	return out, err
}

// countSpread begins to count.
func (m *measurement) countSpread() error {
	rules := "table inet spread {\n chain out {\n type filter hook output priority 0;\n"
	for s := 1; s <= m.cfg.Spines; s++ {
		rules += fmt.Sprintf(" oifname \"s%d\" udp dport %d counter\n", s, probePort)
	}
	return m.lab.nodes["host-1"].nft(rules + " }\n}\n")
}

// hasRoute says whether a node's kernel has a route of ours.
func (l *Lab) hasRoute(node string, to netip.Prefix) (bool, error) {
	rs, err := l.nodes[node].routesOf(netplane.Protocol)
	if err != nil {
		return false, err
	}
	for _, r := range rs {
		if r.Dst == nil {
			continue
		}
		bits, _ := r.Dst.Mask.Size()
		if a, _ := netip.AddrFromSlice(r.Dst.IP); netip.PrefixFrom(a.Unmap(), bits) == to {
			return true, nil
		}
	}
	return false, nil
}

// idle measures what a host's network costs when nothing happens.
func (m *measurement) idle(ctx context.Context) error {
	host := m.c.Pid("host-1")
	bird, err := child(host, "bird")
	if err != nil {
		return err
	}
	cpu := func(pid int) (float64, error) {
		if pid == 0 {
			return 0, nil
		}
		return cpuSeconds(pid)
	}
	h0, err1 := cpu(host)
	b0, err2 := cpu(bird)
	if err := errors.Join(err1, err2, pause(ctx, idleFor)); err != nil {
		return err
	}
	h1, err1 := cpu(host)
	b1, err2 := cpu(bird)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	m.f.HostCPUPct, m.f.BirdCPUPct = 100*(h1-h0)/idleFor.Seconds(), 100*(b1-b0)/idleFor.Seconds()
	if bird != 0 {
		m.f.BirdRSS, err = rss(bird)
	}
	return err
}

// child is a process's child of a name, 0 if there is none.
func child(pid int, name string) (int, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return 0, err
	}
	for _, t := range tasks {
		b, err := os.ReadFile(t)
		if errors.Is(err, os.ErrNotExist) {
			continue // a thread that ended
		}
		if err != nil {
			return 0, err
		}
		for _, f := range strings.Fields(string(b)) {
			n, err := strconv.Atoi(f)
			if err != nil {
				return 0, err
			}
			if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", n)); err == nil && strings.TrimSpace(string(comm)) == name {
				return n, nil
			}
		}
	}
	return 0, nil
}

// cpuSeconds is the processor time a process has used; the kernel counts in
// hundredths of a second.
func cpuSeconds(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, err1 := strconv.ParseFloat(f[11], 64)
	system, err2 := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100, errors.Join(err1, err2)
}

func rss(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(strings.Fields(string(b))[1], 10, 64)
	return n * uint64(os.Getpagesize()), err
}
