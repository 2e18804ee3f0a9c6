import com.fasterxml.jackson.databind.ObjectMapper;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.stream.IntStream;
import org.apache.flink.table.api.EnvironmentSettings;
import org.apache.flink.table.api.ResultKind;
import org.apache.flink.table.api.TableEnvironment;
import org.apache.flink.types.Row;

/** Runs the statements of a file in a Flink of its own, and prints each row of a query as a JSON array. */
public class FlinkSql {
  static final ObjectMapper JSON = new ObjectMapper();

  public static void main(String[] args) throws Exception {
    var tables = TableEnvironment.create(EnvironmentSettings.inStreamingMode());
    for (String statement : Files.readString(Path.of(args[0])).strip().split(";\\s*(\n|$)")) {
      var result = tables.executeSql(statement);
      if (result.getResultKind() == ResultKind.SUCCESS_WITH_CONTENT) {
        try (var rows = result.collect()) {
          while (rows.hasNext()) {
            print(rows.next());
          }
        }
      }
    }
  }

  static void print(Row row) throws Exception {
    System.out.println(JSON.writeValueAsString(IntStream.range(0, row.getArity()).mapToObj(row::getField).toList()));
  }
}
