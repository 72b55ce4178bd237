package main

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/status"
)

// clusterVersion is the version of a local cluster's directory.
const clusterVersion = 1

// localCluster is the description of a cluster that lives in one directory:
//
//	D/cluster.json            this
//	D/lock                    held by the running `cairn up`
//	D/meta-N/, D/host-N/      what each node keeps; config.toml is written at every start
//	D/run/NAME.pid            process ids; D/run/NAME.hold keeps the supervisor from restarting NAME
//	D/log/NAME.log            what each said
type localCluster struct {
	Version   int         `json:"version"`
	ID        string      `json:"id"`
	StoreSize uint64      `json:"storeSizeBytes"`
	Stores    int         `json:"storesPerHost,omitempty"` // 0: one
	Slow      int         `json:"slowPerHost,omitempty"`   // the last ones of these
	Meta      []localMeta `json:"meta"`
	Hosts     []localHost `json:"hosts"`
	dir       string
}

type localMeta struct {
	ID   string `json:"id"`
	API  string `json:"api"`
	Raft string `json:"raft"`
}

type localHost struct {
	Name    string `json:"name"`
	Data    string `json:"data"`
	Control string `json:"control"`
}

func defaultDir() string {
	if d := os.Getenv("XDG_DATA_HOME"); d != "" {
		return filepath.Join(d, "cairn")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "cairn-data"
	}
	return filepath.Join(home, ".local", "share", "cairn")
}

func (l *localCluster) path(parts ...string) string {
	return filepath.Join(append([]string{l.dir}, parts...)...)
}

// openCluster reads a local cluster's description.
func openCluster(dir string) (*localCluster, error) {
	b, err := os.ReadFile(filepath.Join(dir, "cluster.json"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, status.Errorf(status.NotFound, "there is no cluster in %s: `cairn up --dir %s` makes one", dir, dir)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the cluster in %s: %w", dir, err)
	}
	l := &localCluster{dir: dir}
	if err := json.Unmarshal(b, l); err != nil {
		return nil, status.Errorf(status.Corrupt, "%s/cluster.json is damaged (%w): restore it, the data beside it is untouched", dir, err)
	}
	if l.Version != clusterVersion {
		return nil, status.Errorf(status.Unsupported, "the cluster in %s is of version %d and this cairn reads version %d: use the cairn that made it", dir, l.Version, clusterVersion)
	}
	return l, nil
}

// createCluster makes the description of a new cluster with free ports of this
// machine.
func createCluster(dir string, f upFlags, storeSize uint64) (*localCluster, error) {
	if err := os.MkdirAll(filepath.Join(dir, "run"), 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the cluster's directory: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", dir, err)
	}
	for _, e := range entries {
		if n := e.Name(); n != "run" && n != "lock" && n != "log" && n != "cluster.json.new" {
			return nil, status.Errorf(status.Exists, "%s holds %q and no cluster: name an empty directory", dir, n)
		}
	}
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	l := &localCluster{Version: clusterVersion, ID: hex.EncodeToString(id[:]), StoreSize: storeSize, Stores: f.stores, Slow: f.slow, dir: dir}
	ports, err := freePorts(2*f.metas + 2*f.hosts)
	if err != nil {
		return nil, err
	}
	next := func() string { p := ports[0]; ports = ports[1:]; return p }
	for i := range f.metas {
		l.Meta = append(l.Meta, localMeta{ID: fmt.Sprintf("meta-%d", i+1), API: next(), Raft: next()})
	}
	for i := range f.hosts {
		l.Hosts = append(l.Hosts, localHost{Name: fmt.Sprintf("host-%d", i+1), Data: next(), Control: next()})
	}
	b, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return nil, err
	}
	return l, writeFile(l.path("cluster.json"), append(b, '\n'))
}

// freePorts finds ports below the range the kernel gives to outgoing
// connections, so that a restarted node finds its own free again.
func freePorts(n int) ([]string, error) {
	low := 32768
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		if f := strings.Fields(string(b)); len(f) == 2 {
			if v, err := strconv.Atoi(f[0]); err == nil {
				low = v
			}
		}
	}
	var seed [2]byte
	_, _ = rand.Read(seed[:]) // never fails
	span := max(low-10000, 1000)
	start := 10000 + (int(seed[0])<<8|int(seed[1]))%span
	var out []string
	for i := 0; i < span && len(out) < n; i++ {
		addr := fmt.Sprintf("127.0.0.1:%d", 10000+(start-10000+i)%span)
		c, err := net.Listen("tcp", addr)
		if err != nil {
			continue
		}
		if err := c.Close(); err != nil {
			return nil, err
		}
		out = append(out, addr)
	}
	if len(out) < n {
		return nil, status.Errorf(status.Unavailable, "there are no %d free ports on this machine", n)
	}
	return out, nil
}

// lock keeps a second `cairn up` out.
func lockCluster(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the cluster's directory: %w", err)
	}
	f, err := lockFile(filepath.Join(dir, "lock"))
	if status.Of(err) == status.Held {
		return nil, status.Errorf(status.Held, "the cluster in %s is already up: `cairn down --dir %s` stops it", dir, dir)
	}
	return f, err
}

// lockFile takes an exclusive lock that goes with the process.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open the lock %s: %w", path, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(status.Errorf(status.Held, "%s is locked by another process: stop it first", path), f.Close())
	}
	return f, nil
}

func (l *localCluster) metaAddrs() []string {
	var out []string
	for _, m := range l.Meta {
		out = append(out, m.API)
	}
	return out
}

// metaConfig is the configuration of metadata node i.
func (l *localCluster) metaConfig(i int) *metaConfig {
	m := l.Meta[i]
	c := &metaConfig{ID: m.ID, Dir: l.path(m.ID), Cluster: l.ID, API: m.API, Raft: m.Raft, TimeoutMs: 200}
	for _, p := range l.Meta {
		c.Peers = append(c.Peers, peerConfig(p))
	}
	return c
}

// hostConfig is the configuration of host i.
func (l *localCluster) hostConfig(i int) *hostConfig {
	h := l.Hosts[i]
	c := &hostConfig{Name: h.Name, Dir: l.path(h.Name), Cluster: l.ID, Meta: l.metaAddrs(), Data: h.Data, Control: h.Control,
		NBD: l.path(h.Name, "nbd.sock")}
	for n := range max(1, l.Stores) {
		s := storeConfig{Path: l.path(h.Name, fmt.Sprintf("store-%d", n+1)), Size: strconv.FormatUint(l.StoreSize, 10), Thin: true}
		if n >= max(1, l.Stores)-l.Slow {
			s.Class = state.ClassSlow
		}
		c.Stores = append(c.Stores, s)
	}
	return c
}

func pidFile(dir, name string) string { return filepath.Join(dir, "run", name+".pid") }

// readPid returns the process id in a pid file if that process is alive, or 0.
func readPid(path string) (int, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, status.Errorf(status.Corrupt, "%s does not hold a process id", path)
	}
	if err := unix.Kill(pid, 0); err != nil {
		return 0, nil // gone: the file is a leftover
	}
	return pid, nil
}
