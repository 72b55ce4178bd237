package server

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// A line of raft's keeps the time and the node of a line of ours, and reads well.
func TestLinesOfRaftAreLinesOfOurs(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(slog.NewJSONHandler(&out, nil)).With("node", "meta-1")
	raftLogger(log).Error("failed to contact", "server-id", "meta-3", "time", 500, "node", "Node at x", "servers", hclog.Fmt("%+v", []string{"a", "b"}))
	line := out.String()
	for _, want := range []string{`"level":"WARN"`, `"msg":"raft: failed to contact"`, `"node":"meta-1"`, `"raft-node":"Node at x"`, `"raft-time":500`, `"servers":"[a b]"`} {
		if !strings.Contains(line, want) {
			t.Errorf("%s does not have %s", line, want)
		}
	}
	var l struct{ Time string }
	if err := json.Unmarshal([]byte(line), &l); err != nil || strings.Count(line, `"time":`) != 1 {
		t.Errorf("%s: %v", line, err)
	}
}
