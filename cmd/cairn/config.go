package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/netplane/link"
	"github.com/cairnstore/cairn/proto/status"
)

// metaConfig is the file of `cairn meta run`.
type metaConfig struct {
	ID        string       `toml:"id"`
	Dir       string       `toml:"dir"`
	Cluster   string       `toml:"cluster"` // the cluster's identity, the same on every machine
	API       string       `toml:"api"`     // host:port for gateways, hosts and the CLI
	Raft      string       `toml:"raft"`    // host:port for the other nodes
	Peers     []peerConfig `toml:"peer"`    // all nodes, this one included
	TimeoutMs int          `toml:"timeout_ms"`
	Join      bool         `toml:"join,omitempty"`       // begin empty and wait to be added; no peers then
	LogFormat string       `toml:"log_format,omitempty"` // text (default) or json
	Metrics   string       `toml:"metrics,omitempty"`    // host:port of /metrics; empty: none
}

type peerConfig struct {
	ID   string `toml:"id"`
	API  string `toml:"api"`
	Raft string `toml:"raft"`
}

// hostConfig is the file of `cairn host run`.
type hostConfig struct {
	Name    string            `toml:"name"`
	Dir     string            `toml:"dir"`
	Cluster string            `toml:"cluster"`
	Meta    []string          `toml:"meta"`    // host:port of every metadata node; one node's paths with commas
	Data    string            `toml:"data"`    // host:port of the chunk server; with commas: the stable address, then one per plane
	Control string            `toml:"control"` // host:port of the control service
	NBD     string            `toml:"nbd"`     // unix socket of the NBD server
	Labels  map[string]string `toml:"labels"`  // rack, zone
	CPUs    int               `toml:"cpus"`    // for VMs
	Memory  string            `toml:"memory"`  // for VMs
	Stores  []storeConfig     `toml:"store"`

	JoinToken string `toml:"join_token,omitempty"` // of `cairn host token`; needed once, by a new host
	LogFormat string `toml:"log_format,omitempty"` // text (default) or json
	Metrics   string `toml:"metrics,omitempty"`    // host:port of /metrics; empty: none

	ReplaceAfter string `toml:"replace_after,omitempty"` // copies on a store that is out for longer are made on others (10m)

	nbdConfig

	promiseConfig

	Network networkConfig `toml:"network,omitempty"`

	memory       uint64
	replaceAfter time.Duration
}

type storeConfig struct {
	Path string `toml:"path"`
	Size string `toml:"size"` // of a store file that does not exist yet
	// Thin: the file takes up what is written only, and others may fill the file
	// system under it; else its whole space is reserved. Devices are what they are.
	Thin bool `toml:"thin,omitempty"`
	// Class says what the store is for: new chunks and used ones go to fast stores,
	// and what nobody uses to slow ones when those fill.
	Class string `toml:"class,omitempty"` // fast (default) or slow
	Scrub string `toml:"scrub,omitempty"` // bytes per second read to verify everything, once a week; "0": only when asked (16M)

	size  uint64
	scrub int64
}

func loadFile(path string, into any) error {
	md, err := toml.DecodeFile(path, into)
	if errors.Is(err, os.ErrNotExist) {
		return status.Errorf(status.NotFound, "there is no configuration file %s", path)
	}
	if err != nil {
		return status.Errorf(status.Invalid, "configuration file %s: %w", path, err)
	}
	if un := md.Undecoded(); len(un) > 0 {
		return status.Errorf(status.Invalid, "configuration file %s: %s is not a setting: is it misspelt?", path, un[0])
	}
	return nil
}

func loadMetaConfig(path string) (*metaConfig, error) {
	c := &metaConfig{}
	if err := loadFile(path, c); err != nil {
		return nil, err
	}
	if err := c.check(); err != nil {
		return nil, status.Errorf(status.Invalid, "configuration file %s: %w", path, err)
	}
	return c, nil
}

func loadHostConfig(path string) (*hostConfig, error) {
	c := &hostConfig{}
	if err := loadFile(path, c); err != nil {
		return nil, err
	}
	if err := c.check(); err != nil {
		return nil, status.Errorf(status.Invalid, "configuration file %s: %w", path, err)
	}
	return c, nil
}

func checkAddr(what, addr string) error {
	if err := link.CheckAddrs(addr); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

func (c *metaConfig) check() error {
	if c.ID == "" || c.Dir == "" || c.Cluster == "" {
		return fmt.Errorf("id, dir and cluster are all needed")
	}
	if err := cmp.Or(checkLogFormat(c.LogFormat), checkMetrics(c.Metrics)); err != nil {
		return err
	}
	if c.Join {
		if len(c.Peers) > 0 {
			return fmt.Errorf("a node with join = true lists no peers: `cairn meta add` tells it of them")
		}
		return errors.Join(checkAddr("api", c.API), checkAddr("raft", c.Raft))
	}
	if len(c.Peers) != 1 && len(c.Peers) != 3 && len(c.Peers) != 5 {
		return fmt.Errorf("a cluster has 1, 3 or 5 metadata nodes, not %d: list each as a [[peer]]", len(c.Peers))
	}
	self := false
	seen := map[string]bool{}
	for _, p := range c.Peers {
		if p.ID == "" || seen[p.ID] {
			return fmt.Errorf("peer %q is listed twice or has no id", p.ID)
		}
		seen[p.ID] = true
		self = self || p.ID == c.ID
		if err := errors.Join(checkAddr("peer api", p.API), checkAddr("peer raft", p.Raft)); err != nil {
			return err
		}
		if len(link.SplitAddrs(p.API)) != len(link.SplitAddrs(p.Raft)) {
			return fmt.Errorf("peer %s: api and raft list different numbers of addresses: one for each path in both", p.ID)
		}
	}
	if !self {
		return fmt.Errorf("this node, %s, is not among its own peers", c.ID)
	}
	return errors.Join(checkAddr("api", c.API), checkAddr("raft", c.Raft))
}

func checkMetrics(addr string) error {
	if addr == "" {
		return nil
	}
	return checkAddr("metrics", addr)
}

func checkLogFormat(f string) error {
	if f != "" && f != "text" && f != "json" {
		return fmt.Errorf("log_format = %q is not text or json", f)
	}
	return nil
}

func (c *hostConfig) check() (err error) {
	if err := cmp.Or(checkLogFormat(c.LogFormat), checkMetrics(c.Metrics)); err != nil {
		return err
	}
	if c.Name == "" || c.Dir == "" || c.Cluster == "" || len(c.Meta) == 0 {
		return fmt.Errorf("name, dir, cluster and meta are all needed")
	}
	if len(c.Stores) == 0 {
		return fmt.Errorf("a host needs at least one [[store]]")
	}
	for _, m := range c.Meta {
		if err := checkAddr("meta", m); err != nil {
			return err
		}
	}
	if err := c.checkNetwork(); err != nil {
		return err
	}
	if err := errors.Join(checkAddr("data", c.Data), checkAddr("control", c.Control)); err != nil {
		return err
	}
	if c.ReplaceAfter != "" {
		if c.replaceAfter, err = time.ParseDuration(c.ReplaceAfter); err != nil || c.replaceAfter <= 0 {
			return fmt.Errorf("replace_after = %q is not a time such as 10m or 1h30m", c.ReplaceAfter)
		}
	}
	if c.NBD == "" {
		c.NBD = filepath.Join(c.Dir, "nbd.sock")
	}
	if err := c.nbdConfig.check(); err != nil {
		return err
	}
	if c.Memory != "" {
		if c.memory, err = parseSize(c.Memory); err != nil {
			return err
		}
	}
	if err := c.promiseConfig.check(); err != nil {
		return err
	}
	for i := range c.Stores {
		s := &c.Stores[i]
		if s.Path == "" {
			return fmt.Errorf("store %d has no path", i+1)
		}
		if s.Class != "" && s.Class != state.ClassFast && s.Class != state.ClassSlow {
			return fmt.Errorf("store %s: class = %q is not %s or %s", s.Path, s.Class, state.ClassFast, state.ClassSlow)
		}
		if s.Size != "" {
			if s.size, err = parseSize(s.Size); err != nil {
				return err
			}
		}
		s.scrub = defaultScrubPace
		if s.Scrub != "" {
			n, err := parseSize(s.Scrub)
			if err != nil {
				return err
			}
			s.scrub = int64(n)
		}
	}
	return nil
}

// writeConfig writes a configuration as TOML, whole or not at all.
func writeConfig(path string, c any) error {
	var b strings.Builder
	if err := toml.NewEncoder(&b).Encode(c); err != nil {
		return fmt.Errorf("configuration %s: %w", path, err)
	}
	return writeFile(path, []byte(b.String()))
}

// writeFile replaces a file: whoever reads it sees the old or the new, whole,
// also after a power loss.
func writeFile(path string, b []byte) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return rename(tmp, path)
}

// rename gives a file its name, durably.
func rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(to))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func configCommand() *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "Configuration files of daemons"}
	c.AddCommand(sampleCommand(), &cobra.Command{
		Use:     "check FILE",
		Short:   "Say whether a configuration file of `meta run` or `host run`, or of a storage network, is right",
		Example: "  cairn config check /etc/cairn/host.toml",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			_, herr := loadHostConfig(args[0])
			if herr == nil {
				fmt.Printf("%s: a right configuration of a host\n", args[0])
				return nil
			}
			_, nerr := loadTopology(args[0])
			if nerr == nil {
				fmt.Printf("%s: a right storage network\n", args[0])
				return nil
			}
			if b, err := os.ReadFile(args[0]); err == nil && strings.Contains(string(b), "[[cable]]") {
				return nerr
			}
			_, merr := loadMetaConfig(args[0])
			if merr == nil {
				fmt.Printf("%s: a right configuration of a metadata node\n", args[0])
				return nil
			}
			if strings.Contains(herr.Error(), "is not a setting") || status.Of(herr) == status.NotFound {
				return merr
			}
			return herr
		},
	})
	return c
}
