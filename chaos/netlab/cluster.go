package netlab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/cairnstore/cairn/netplane/agent"
	"github.com/cairnstore/cairn/proto/status"
)

// Ports of the cluster in a lab, on every address of a host.
const (
	dataPort    = "7000"
	controlPort = "7001"
	apiPort     = "7002"
	raftPort    = "7003"
)

// Bounds of starting and stopping a cluster's process.
const (
	startWait = 40 * time.Second
	stopWait  = 20 * time.Second
)

// Cluster is a cairn cluster in a bare lab: a metadata node beside each of the
// first three hosts (one, with two hosts), a process each.
type Cluster struct {
	lab   *Lab
	bin   string
	procs []*proc
	metas int
	wait  time.Duration // for processes to end
}

type proc struct {
	name  string
	cmd   *exec.Cmd
	ready chan struct{} // closed when it says so
	ended chan struct{}
	err   error // how it ended; read after ended
}

// Meta are the metadata nodes' addresses, for --meta.
func (c *Cluster) Meta() string {
	var out []string
	for i := range c.metas {
		out = append(out, net.JoinHostPort(Stable(i+1).String(), apiPort))
	}
	return strings.Join(out, ",")
}

// NBD is the socket of a host's NBD server.
func (c *Cluster) NBD(host int) string {
	return filepath.Join(c.lab.cfg.Dir, fmt.Sprintf("host-%d", host), "nbd.sock")
}

// all is a port on every address of a host, the stable one first.
func (l *Lab) all(host, port string) string {
	addrs, _ := agent.Planes(l.Topology, host)
	var out []string
	for _, a := range addrs {
		out = append(out, net.JoinHostPort(a.String(), port))
	}
	return strings.Join(out, ",")
}

// StartCluster runs a cairn cluster in a bare lab with the given binary, and
// returns when all of it is ready.
func (l *Lab) StartCluster(ctx context.Context, bin string) (c *Cluster, err error) {
	if !l.cfg.Bare {
		return nil, status.Errorf(status.Invalid, "a cluster sees to its hosts' network itself: the lab must be bare")
	}
	c = &Cluster{lab: l, bin: bin, metas: 3, wait: stopWait}
	if l.cfg.Hosts < 3 {
		c.metas = 1
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	if err := writeTOML(filepath.Join(l.cfg.Dir, "network.toml"), l.Topology); err != nil {
		return c, err
	}
	for i := 1; i <= l.cfg.Hosts; i++ {
		if err := c.start(fmt.Sprintf("host-%d", i), "host", c.hostConfig(i)); err != nil {
			return c, err
		}
	}
	if err := l.addressed(ctx); err != nil { // the metadata nodes listen at what the hosts bring up
		return c, err
	}
	for i := 1; i <= c.metas; i++ {
		if err := c.start(fmt.Sprintf("host-%d", i), "meta", c.metaConfig(i)); err != nil {
			return c, err
		}
	}
	late := time.After(startWait)
	for _, p := range c.procs {
		select {
		case <-p.ready:
		case <-p.ended:
			return c, status.Errorf(status.Unavailable, "%s ended at its start (%v): %s says why", p.name, p.err, c.log(p.name))
		case <-late:
			return c, status.Errorf(status.Timeout, "%s is not ready after %v: %s says why", p.name, startWait, c.log(p.name))
		case <-ctx.Done():
			return c, ctx.Err()
		}
	}
	return c, nil
}

func (c *Cluster) log(name string) string { return filepath.Join(c.lab.cfg.Dir, name+".log") }

func (c *Cluster) hostConfig(i int) map[string]any {
	name := fmt.Sprintf("host-%d", i)
	var meta []string
	for m := range c.metas {
		meta = append(meta, c.lab.all(fmt.Sprintf("host-%d", m+1), apiPort))
	}
	dir := filepath.Join(c.lab.cfg.Dir, name)
	return map[string]any{"name": name, "dir": dir, "cluster": "netlab", "meta": meta, "data": ":" + dataPort,
		"control": net.JoinHostPort(Stable(i).String(), controlPort), "nbd": c.NBD(i),
		"store":   []map[string]any{{"path": filepath.Join(dir, "store"), "size": "1G"}},
		"network": map[string]any{"topology": filepath.Join(c.lab.cfg.Dir, "network.toml")}}
}

func (c *Cluster) metaConfig(i int) map[string]any {
	var peers []map[string]any
	for m := 1; m <= c.metas; m++ {
		host := fmt.Sprintf("host-%d", m)
		peers = append(peers, map[string]any{"id": fmt.Sprintf("meta-%d", m), "api": c.lab.all(host, apiPort), "raft": c.lab.all(host, raftPort)})
	}
	own := peers[i-1]
	return map[string]any{"id": own["id"], "dir": filepath.Join(c.lab.cfg.Dir, own["id"].(string)), "cluster": "netlab",
		"api": own["api"], "raft": own["raft"], "peer": peers}
}

func writeTOML(path string, v any) (err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return toml.NewEncoder(f).Encode(v)
}

// addressed waits until every host has its stable address.
func (l *Lab) addressed(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for i := 1; i <= l.cfg.Hosts; {
		var have bool
		n := l.nodes[fmt.Sprintf("host-%d", i)]
		lo, err := n.nl.LinkByName("lo")
		if err != nil {
			return err
		}
		addrs, err := n.nl.AddrList(lo, syscall.AF_INET)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			have = have || a.IP.String() == Stable(i).String()
		}
		if have {
			i++
			continue
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return status.Errorf(status.Timeout, "host-%d did not bring up its address: %s says why", i, filepath.Join(l.cfg.Dir, n.name+".log"))
		}
	}
	return nil
}

// start runs `cairn KIND run` in a node's namespace.
func (c *Cluster) start(node, kind string, cfg map[string]any) error {
	name := node
	if kind == "meta" {
		name = cfg["id"].(string)
	}
	if err := os.MkdirAll(cfg["dir"].(string), 0o755); err != nil {
		return err
	}
	file := filepath.Join(c.lab.cfg.Dir, name+".toml")
	if err := writeTOML(file, cfg); err != nil {
		return err
	}
	log, err := os.OpenFile(c.log(name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	p := &proc{name: name, ready: make(chan struct{}), ended: make(chan struct{})}
	p.cmd = exec.Command(c.bin, kind, "run", "--config", file)
	p.cmd.Stderr = log
	// It dies with the node's thread, and so with the lab.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	out, err := p.cmd.StdoutPipe()
	if err == nil {
		err = c.lab.In(node, p.cmd.Start)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("cannot start %s: %w", name, err), log.Close())
	}
	go func() {
		defer close(p.ended)
		said := false
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if lines.Text() == "ready" && !said {
				said = true
				close(p.ready)
			}
		}
		p.err = errors.Join(p.cmd.Wait(), log.Close())
	}()
	c.procs = append(c.procs, p)
	return nil
}

// Kill ends a host's process at once and starts it again.
func (c *Cluster) Kill(ctx context.Context, host int) error {
	name := fmt.Sprintf("host-%d", host)
	for i, p := range c.procs {
		if p.name != name {
			continue
		}
		if err := p.cmd.Process.Kill(); err != nil {
			return err
		}
		<-p.ended
		c.procs = slices.Delete(c.procs, i, i+1)
		break
	}
	if err := c.start(name, "host", c.hostConfig(host)); err != nil {
		return err
	}
	p := c.procs[len(c.procs)-1]
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	select {
	case <-p.ready:
		return nil
	case <-p.ended:
		return status.Errorf(status.Unavailable, "%s ended at its start (%v): %s says why", name, p.err, c.log(name))
	case <-ctx.Done():
		return status.Errorf(status.Timeout, "%s is not ready again: %s says why", name, c.log(name))
	}
}

// Pid is the process of a host or a metadata node; 0 if there is none.
func (c *Cluster) Pid(name string) int {
	for _, p := range c.procs {
		if p.name == name {
			return p.cmd.Process.Pid
		}
	}
	return 0
}

// Cairn runs a command of the command line beside the first host and returns
// its stdout.
func (c *Cluster) Cairn(ctx context.Context, args ...string) (string, error) {
	var out, errs strings.Builder
	cmd := exec.CommandContext(ctx, c.bin, args...)
	cmd.Env = append(os.Environ(), "CAIRN_META="+c.Meta())
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := c.lab.In("host-1", cmd.Start); err != nil {
		return "", err
	}
	if err := cmd.Wait(); err != nil {
		return out.String(), fmt.Errorf("`cairn %s`: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// volumeState is what `cairn volume show` says of members.
type volumeState struct {
	Revision uint64
	Members  []struct{ InSync bool }
}

func (c *Cluster) volume(ctx context.Context, name string) (v volumeState, err error) {
	out, err := c.Cairn(ctx, "volume", "show", name, "-o", "json")
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		return v, fmt.Errorf("`cairn volume show` printed no such JSON: %w", err)
	}
	return v, nil
}

// Close stops all processes, the hosts first.
func (c *Cluster) Close() error {
	var errs []error
	for _, kind := range []string{"host-", "meta-"} {
		late, cancel := context.WithTimeout(context.Background(), c.wait) // of all: two may hang
		defer cancel()
		for _, p := range c.procs {
			if strings.HasPrefix(p.name, kind) {
				if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
					errs = append(errs, err)
				}
			}
		}
		for _, p := range c.procs {
			if !strings.HasPrefix(p.name, kind) {
				continue
			}
			select {
			case <-p.ended:
			case <-late.Done():
				// Its goroutines in its log say what it waits for.
				errs = append(errs, status.Errorf(status.Timeout, "%s did not stop in %v and was killed: the end of %s says what it waited for", p.name, c.wait, c.log(p.name)),
					p.cmd.Process.Signal(syscall.SIGQUIT))
				<-p.ended
			}
		}
	}
	c.procs = nil
	return errors.Join(errs...)
}
