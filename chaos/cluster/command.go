package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// commandMaxWait bounds one command of the command line.
const commandMaxWait = 30 * time.Second

// CommandError is a failed command: its exit status and what it said.
type CommandError struct {
	Args   []string
	Status int
	Stderr string
}

func (e *CommandError) Error() string {
	return fmt.Sprintf("`cairn %s` ended with status %d: %s", strings.Join(e.Args, " "), e.Status, e.Stderr)
}

// Cairn runs one command on this cluster and returns its stdout.
func (c *Cluster) Cairn(ctx context.Context, args ...string) (string, error) {
	return c.CairnWithin(ctx, commandMaxWait, args...)
}

// CairnWithin is Cairn for a command that may take so long.
func (c *Cluster) CairnWithin(ctx context.Context, most time.Duration, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, c.cfg.Bin, append(args[:len(args):len(args)], "--dir", c.cfg.Dir)...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return stdout.String(), &CommandError{Args: args, Status: exit.ExitCode(), Stderr: strings.TrimSpace(stderr.String())}
	}
	if err != nil {
		return "", fmt.Errorf("`cairn %s`: %w: %s", strings.Join(args, " "), errors.Join(err, ctx.Err()), stderr.String())
	}
	return stdout.String(), nil
}

// query runs a command that shows something and reads its JSON.
func (c *Cluster) query(ctx context.Context, into any, args ...string) error {
	out, err := c.Cairn(ctx, append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(out), into); err != nil {
		return fmt.Errorf("`cairn %s -o json` printed no such JSON: %w: %.200s", strings.Join(args, " "), err, out)
	}
	return nil
}

// MetaNode is a row of `cairn meta ls`.
type MetaNode struct {
	ID     string `json:"id"`
	Addr   string `json:"addr"`
	Leader bool   `json:"leader"`
	State  string `json:"state"`
}

// MetaNodes lists the metadata nodes.
func (c *Cluster) MetaNodes(ctx context.Context) ([]MetaNode, error) {
	var nodes []MetaNode
	return nodes, c.query(ctx, &nodes, "meta", "ls")
}

// CreateVolume creates a volume.
func (c *Cluster) CreateVolume(ctx context.Context, name string, sizeBytes uint64, replicas int) error {
	_, err := c.Cairn(ctx, "volume", "create", name, "--size", strconv.FormatUint(sizeBytes, 10), "--replicas", strconv.Itoa(replicas))
	return err
}

// Attach attaches a volume on a host and returns its NBD URI.
func (c *Cluster) Attach(ctx context.Context, name, host string) (uri string, err error) {
	out, err := c.Cairn(ctx, "volume", "attach", name, "--host", host)
	return strings.TrimSpace(out), err
}

// Detach detaches a volume wherever it is.
func (c *Cluster) Detach(ctx context.Context, name string) error {
	_, err := c.Cairn(ctx, "volume", "detach", name)
	return err
}

// Volume is a volume as `cairn volume show` tells it.
type Volume struct {
	Name     string   `json:"name"`
	Epoch    uint32   `json:"epoch"`
	Replicas int      `json:"replicas"`
	Holder   string   `json:"attachedOn"`
	State    string   `json:"state"`
	Members  []Member `json:"members"`
}

// Member is one store's copy of a volume.
type Member struct {
	Host   string `json:"host"`
	InSync bool   `json:"inSync"` // as metadata has it
	State  string `json:"state"`  // as the gateway has it, while there is one

	JoinedBytes uint64 `json:"joinedBytes"` // sent to it by the running or last catch-up
}

// ShowVolume tells a volume's state.
func (c *Cluster) ShowVolume(ctx context.Context, name string) (Volume, error) {
	var v Volume
	return v, c.query(ctx, &v, "volume", "show", name)
}

// Volumes lists all volumes.
func (c *Cluster) Volumes(ctx context.Context) ([]Volume, error) {
	var vs []Volume
	return vs, c.query(ctx, &vs, "volume", "ls")
}

// Host is a row of `cairn host ls`.
type Host struct {
	Name     string `json:"name"`
	Up       bool   `json:"up"`
	DataAddr string `json:"dataAddr"`
}

// Hosts lists the hosts.
func (c *Cluster) Hosts(ctx context.Context) ([]Host, error) {
	var hs []Host
	return hs, c.query(ctx, &hs, "host", "ls")
}

// askEvery is the pause between two looks at a state that is waited for.
const askEvery = 200 * time.Millisecond

// Await asks again and again until ok is true, and says what it last saw when
// ctx ends first. A failed question is asked again too.
func (c *Cluster) Await(ctx context.Context, what string, ok func(context.Context) (bool, string, error)) error {
	for {
		done, saw, err := ok(ctx)
		if err == nil && done {
			return nil
		}
		if err != nil && ctx.Err() == nil {
			saw = err.Error()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited in vain until %s (%w); last: %s", what, ctx.Err(), saw)
		case <-time.After(askEvery):
		}
	}
}

// InSync tells whether every member of the volume is in-sync, in metadata and
// for the gateway, and every host is up.
func (c *Cluster) InSync(ctx context.Context, name string) (bool, string, error) {
	v, err := c.ShowVolume(ctx, name)
	if err != nil {
		return false, "", err
	}
	hosts, err := c.Hosts(ctx)
	if err != nil {
		return false, "", err
	}
	ok := len(v.Members) >= v.Replicas
	for _, m := range v.Members {
		ok = ok && m.InSync && m.State == "in-sync"
	}
	for _, h := range hosts {
		ok = ok && h.Up
	}
	return ok, fmt.Sprintf("%+v %+v", v, hosts), nil
}

// WaitInSync waits until the volume is InSync.
func (c *Cluster) WaitInSync(ctx context.Context, name string) error {
	return c.Await(ctx, "all members of "+name+" are in-sync", func(ctx context.Context) (bool, string, error) {
		return c.InSync(ctx, name)
	})
}
