package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
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
	ctx, cancel := context.WithTimeout(ctx, commandMaxWait)
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
